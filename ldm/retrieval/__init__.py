"""Databases of embeddings, the search for nearest neighbours in them, and what embeds images and texts."""
