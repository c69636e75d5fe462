"""Write the prompts and render the images of a recipe."""

import sys

from selma_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
