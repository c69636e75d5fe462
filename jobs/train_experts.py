"""Fit the skill experts of a recipe."""

import sys

from selma_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
