"""The paper's tables: rows, what they cost, how they are printed."""
