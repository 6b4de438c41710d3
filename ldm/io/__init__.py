"""Files from outside and values in them, read with care; files written whole or not at all."""
