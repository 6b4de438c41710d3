"""Measures of images, from files to numbers."""
