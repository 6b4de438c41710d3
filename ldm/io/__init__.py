"""Reading files safely, checking the values in them, and writing files atomically."""
