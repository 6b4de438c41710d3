"""Measurements on images and models."""
