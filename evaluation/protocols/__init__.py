"""Protocols: which prompts and settings every method is measured with."""
