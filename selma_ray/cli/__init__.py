"""The command line."""

from selma_ray.cli.commands import main

__all__ = ["main"]
