"""Write questions about prompts with a language model in vLLM: DSG's or TIFA's, into a suite file that can be read and mended.

python -m jobs.write_questions PROMPTS QUESTIONS.jsonl [key.path=value ...]

PROMPTS is a text file of one a line, or JSON Lines of {"prompt"} with "id" and "skill" where there are any; the overrides are keys of
`selma_ray.judging.writing.config.QuestionsConfig`, such as llm.name=FOLDER style=tifa. Prompts that QUESTIONS.jsonl holds
already are not asked about again; those that fail stand in QUESTIONS.failed.jsonl.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.config import apply_overrides, validate
from selma_ray.errors import SelmaError
from selma_ray.judging.tifa import CaptionAnswerer
from selma_ray.judging.writing.config import QuestionsConfig
from selma_ray.judging.writing.files import read_prompts, write_questions


def main(arguments: Sequence[str]) -> int:
    """Write the file and print its counts as one JSON line; returns 0, or 1 where prompts failed, 2 for a bad key."""
    if len(arguments) < 2:
        sys.stderr.write(f"{(__doc__ or '').splitlines()[2]}\n")
        return 2
    prompts_path, questions_path, *overrides = arguments
    try:
        config = validate(QuestionsConfig, apply_overrides({}, overrides), "questions")
        prompts = read_prompts(Path(prompts_path))
        cluster = ClusterConfig()
        connect(cluster)
        from selma_ray.judging.writing.engine import vllm_replies

        answerer = _caption_answerer(config)
        written = write_questions(prompts, config, Path(questions_path), vllm_replies(config, cluster), answerer)
    except SelmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(asdict(written)) + "\n")
    return 1 if written.failed else 0


def _caption_answerer(config: QuestionsConfig) -> CaptionAnswerer | None:
    if config.caption_model is None:
        return None
    from selma_ray.judging.caption_answerer import Seq2SeqAnswerer

    return Seq2SeqAnswerer(config.caption_model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
