"""Score detections, answers or rankings that other programs made, by published rules: GenEval's, T2I-CompBench's, TIFA's, DSG's.

python -m jobs.score_file FILE rules=geneval [key.path=value ...]

FILE is JSON Lines, of what stands in `selma_ray.judging.score_files`; the overrides are keys of its `ScoreFileConfig`. Prints the
figures as one line of JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from selma_ray.config import apply_overrides, validate
from selma_ray.errors import SelmaError
from selma_ray.judging.score_files import ScoreFileConfig, score_file


def main(arguments: Sequence[str]) -> int:
    """Score a file and print the figures; returns 0, or the exit code of what is wrong."""
    if not arguments:
        sys.stderr.write(f"{(__doc__ or '').splitlines()[2]}\n")
        return 2
    path, *overrides = arguments
    try:
        config = validate(ScoreFileConfig, apply_overrides({}, overrides, ScoreFileConfig), "score_file")
        figures = score_file(Path(path), config)
    except SelmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
