"""The figures of evaluation/figures.py, one module for each kind."""
