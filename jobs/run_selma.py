"""Run the whole of a recipe, from prompts to a served, merged model."""

import sys

from selma_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
