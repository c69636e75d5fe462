"""Score base, experts and merged model of a recipe, and write the report."""

import sys

from selma_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
