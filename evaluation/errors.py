"""What the measures raise."""

from __future__ import annotations


class FeatureError(ValueError):
    """A network that cannot be had."""


class PictureError(ValueError):
    """Pictures or statistics that can't be measured."""


def one_line(error: Exception) -> str:
    """Its message on one line."""
    return " ".join(str(error).split())
