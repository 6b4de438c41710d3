"""Command lines: arguments, checks, and the run that the sampling scripts share."""
