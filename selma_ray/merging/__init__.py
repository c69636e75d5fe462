"""Stage: merging."""
