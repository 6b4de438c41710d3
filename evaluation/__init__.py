"""Measurements on pictures and models."""
