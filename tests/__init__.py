"""A package of this project: another distribution's `tests` would hide one without this file."""
