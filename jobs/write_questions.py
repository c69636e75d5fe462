"""Write questions about prompts with a language model in vLLM: DSG's or TIFA's, into a suite file that can be read and corrected.

python -m jobs.write_questions PROMPTS QUESTIONS.jsonl [key.path=value ...]

PROMPTS is a text file of one a line, or JSON Lines of {"prompt"} with "id" and "skill" where there are any; the overrides are keys of
`selma_ray.judging.writing.config.WriterConfig`, such as llm.name=FOLDER style=tifa. Prompts that QUESTIONS.jsonl holds
already are not asked about again; those that fail stand in QUESTIONS.failed.jsonl.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.config import apply_overrides, validate
from selma_ray.errors import SelmaError
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.files import DraftLines, read_prompts, write_questions
from selma_ray.storage import RunFolder


def main(arguments: Sequence[str]) -> int:
    """Write the file and print its counts as one JSON line; returns 0, or 1 where prompts failed, 2 for a bad key."""
    if len(arguments) < 2:
        sys.stderr.write(f"{(__doc__ or '').splitlines()[2]}\n")
        return 2
    prompts_path, questions_path, *overrides = arguments
    try:
        config = validate(WriterConfig, apply_overrides({}, overrides, WriterConfig), "questions")
        prompts = read_prompts(Path(prompts_path))
        cluster = ClusterConfig()
        connect(cluster)
        written = write_questions(prompts, config, Path(questions_path), _drafts(config, Path(questions_path), cluster))
        shutil.rmtree(f"{questions_path}.parts", ignore_errors=True)
    except SelmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(asdict(written)) + "\n")
    return 1 if written.failed else 0


def _drafts(config: WriterConfig, path: Path, cluster: ClusterConfig) -> DraftLines:
    """Return what writes questions on Ray; what is written is kept beside the file until that is whole, so that a killed job goes on."""
    from selma_ray.judging.writing.on_ray import write_missing
    from selma_ray.judging.writing.written import WrittenQuestions

    folder = RunFolder(f"{path}.parts")

    def draft(prompts: Sequence[str]) -> list[Mapping[str, Any]]:
        written = WrittenQuestions(folder, config)
        write_missing(prompts, config, written, cluster)
        lines = written.lines()
        return [lines[prompt] for prompt in prompts]

    return draft


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
