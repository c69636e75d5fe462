"""Judges: models that answer questions about images."""
