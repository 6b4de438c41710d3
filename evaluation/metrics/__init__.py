"""Measures of images, from files to numbers."""


class ModelError(ValueError):
    """A model that a measure needs can't be had."""
