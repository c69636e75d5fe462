"""Entry points for `ray job submit`: `python -m jobs.NAME RECIPE [key.path=value …]`."""
