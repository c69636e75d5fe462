"""Score the images of a finished evaluation by another metric: clipscore, pickscore, hpsv2, hpsv2.1, imagereward or vqascore.

python -m jobs.score_images RUN_DIR metric=pickscore [key.path=value ...]

The overrides are keys of `selma_ray.evaluation.image_metrics.ScoreImagesConfig`; under `ray job submit` the cluster's workers score, of
which `num_gpus` and `workers` say what they take. Writes the figures to RUN_DIR/evaluation/metrics and
prints them as one line of JSON, the last.
"""

import json
import sys
from collections.abc import Sequence

from selma_ray.config import apply_overrides, validate
from selma_ray.errors import SelmaError


def main(arguments: Sequence[str]) -> int:
    """Score a run's images and print the figures; returns 0, or the exit code of what is wrong."""
    if not arguments:
        sys.stderr.write(f"{(__doc__ or '').splitlines()[2]}\n")
        return 2
    run_dir, *overrides = arguments
    from selma_ray.evaluation.image_metrics import ScoreImagesConfig, score_run
    from selma_ray.storage import RunFolder

    try:
        config = validate(ScoreImagesConfig, apply_overrides({}, overrides, ScoreImagesConfig), "score_images")
        result = score_run(RunFolder(run_dir), config)
    except SelmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
