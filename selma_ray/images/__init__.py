"""Stage: images."""
