"""The written questions in a run's folder: questions/<generator>/<batch>.json, whole batches, each written once and never asked again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from selma_ray.config import identity
from selma_ray.judging.questions import Question
from selma_ray.judging.sources import KnownQuestions
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.files import generator_name
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["WrittenQuestions"]


class WrittenQuestions:
    """What one generator has written about a run's prompts. Pickles, for the actors that write."""

    def __init__(self, folder: RunFolder, config: WriterConfig) -> None:
        self.generator = generator_name(config)
        self._folder = folder
        self._place = f"questions/{content_id(generator=self.generator, settings=identity(config))[:12]}"

    def lines(self) -> dict[str, Mapping[str, Any]]:
        """Return a line for each prompt that was asked about, by prompt; as `draft_lines` makes them."""
        batches = (self._folder.read_json(path) for path in self._folder.files(self._place, suffix=".json"))
        return {line["prompt"]: line for batch in batches for line in batch["lines"]}

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep a batch."""
        name = content_id(prompts=[line["prompt"] for line in lines])
        self._folder.write_json({"generator": self.generator, "lines": list(lines)}, self._place, f"{name}.json")

    def source(self) -> KnownQuestions:
        """Return the questions as a source."""
        questions = {prompt: _questions(line) for prompt, line in self.lines().items() if "failure" not in line}
        return KnownQuestions(questions, f"the language model {self.generator.partition('@')[0]}")

    def counts(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return how many of `prompts` have questions and how many failed, why, and what was repaired, by kind."""
        lines = [line for prompt, line in self.lines().items() if prompt in set(prompts)]
        failures = Counter(line["failure"] for line in lines if "failure" in line)
        repaired = sum((Counter(line["repaired"]) for line in lines), Counter[str]())
        return {
            "generator": self.generator,
            "written": len(lines) - failures.total(),
            "failed": failures.total(),
            "failures": dict(failures.most_common()),
            "repaired": dict(repaired.most_common()),
        }


def _questions(line: Mapping[str, Any]) -> tuple[Question, ...]:
    return tuple(
        Question(**{**each, "parents": tuple(each["parents"]), "choices": tuple(each["choices"])})
        for each in line["questions"]
    )
