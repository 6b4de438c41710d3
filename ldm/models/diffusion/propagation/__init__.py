"""Encoder propagation: at which timesteps the encoder runs, and what the decoder gets at the others."""
