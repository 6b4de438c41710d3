"""What a run costs: multiply-accumulates, memory, seconds."""
