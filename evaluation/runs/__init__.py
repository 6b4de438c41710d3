"""Folders of generated images: written once, checked, read one image at a time."""
