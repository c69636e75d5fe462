"""Merge the experts of a recipe."""

import sys

from selma_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
