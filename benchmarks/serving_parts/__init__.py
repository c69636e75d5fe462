"""Parts of `python -m benchmarks.serving`: load that does not wait for answers, and what kinds of rows cost in one batch."""
