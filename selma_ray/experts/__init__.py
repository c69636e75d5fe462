"""Stage: experts."""
