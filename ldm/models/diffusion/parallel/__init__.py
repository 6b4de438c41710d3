"""How decoders share a device or several."""
