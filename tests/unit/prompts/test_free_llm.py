import random
import time

import pyarrow as pa
import pytest

from selma_ray.errors import ModelNotFoundError
from selma_ray.prompts.config import FreeConfig, LLMConfig, PromptsConfig
from selma_ray.prompts.diversity import DiversityFilter
from selma_ray.prompts.free import AnswerAtNoCost, invent_caption
from selma_ray.prompts.llm import check_llm
from selma_ray.prompts.parsing import parse_numbered_list
from selma_ray.skills import Skill

SKILL = Skill(name="one", description="things", max_words=9, seeds=("a red apple",))


def requests(*seeds: int) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"skill": "one", "request": number, "seed": seed, "text": "", "first_number": 4}
            for number, seed in enumerate(seeds)
        ]
    )


def config(latency_s: float = 0.0) -> PromptsConfig:
    return PromptsConfig(per_request=5, llm=LLMConfig(engine="free", free=FreeConfig(latency_s=latency_s)))


def test_answers_depend_on_the_seed_alone_and_fit_the_skill() -> None:
    answers = AnswerAtNoCost([SKILL], config())(requests(7, 8)).to_pylist()
    again = AnswerAtNoCost([SKILL], config())(requests(8)).to_pylist()
    assert answers[1]["answer"] == again[0]["answer"] != answers[0]["answer"]
    items = parse_numbered_list(answers[0]["answer"])
    assert len(items) == 5
    assert all(item.parsed and len(item.text.split()) <= 9 for item in items)


def test_it_waits_for_each_request() -> None:
    started_s = time.monotonic()
    AnswerAtNoCost([SKILL], config(latency_s=0.02))(requests(1, 2, 3))
    assert time.monotonic() - started_s >= 0.06


def test_nearly_all_captions_pass_the_diversity_rule() -> None:
    rng = random.Random(0)
    diversity = DiversityFilter(0.8)
    for _ in range(1000):
        diversity.add(invent_caption(rng))
    assert sum(diversity.match(invent_caption(rng)) is None for _ in range(100)) >= 98


def test_only_vllm_needs_the_model() -> None:
    check_llm(LLMConfig(engine="free", name="/nowhere"))
    with pytest.raises(ModelNotFoundError):
        check_llm(LLMConfig(name="/nowhere"))
