"""`python -m selma_ray.cli`, where the command `selma` is not on the path."""

import sys

from selma_ray.cli.commands import main

sys.exit(main())
