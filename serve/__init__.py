"""Entry points for `serve deploy` and `serve run`."""
