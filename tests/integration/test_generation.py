"""The stream from requests to images, with a language model in whose place a stage answers at once or late, but always the same."""

import random
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.data import ActorPoolStrategy

from selma_ray.cluster.config import ClusterConfig
from selma_ray.images.config import ImagesConfig
from selma_ray.images.stream import image_summary, read_images, render_stream
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.splits import train_count
from selma_ray.prompts.stream import prompt_stream, prompt_summary, read_prompts
from selma_ray.skills import Skill
from selma_ray.storage import RunFolder

WORDS = (
    "red",
    "blue",
    "green",
    "apple",
    "car",
    "tree",
    "house",
    "under",
    "left",
    "of",
    "two",
    "cup",
    "fish",
    "boat",
    "hat",
)
SKILLS = [
    Skill(name=name, description="things", max_words=12, seeds=("a red apple", "two cups")) for name in ("one", "two")
]
PROMPTS = PromptsConfig(per_skill=20, per_request=6, requests_in_flight=4, max_requests=40)
IMAGES = ImagesConfig(sampling=SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64), batch_size=4)
CLUSTER = ClusterConfig()

# Ray's workers cannot import this file: what it defines goes to them by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("ray_cluster")


class AnswerRequests:
    """Answers a request by its text and seed, after a delay that differs from call to call."""

    def __init__(
        self,
        longest_delay_s: float = 0.0,
        fails_once_kept_in: RunFolder | None = None,
        first_image_in: RunFolder | None = None,
    ) -> None:
        self._longest_delay_s = longest_delay_s
        self._fails_once_kept_in = fails_once_kept_in
        self._first_image_in = first_image_in

    def __call__(self, requests: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._answer(request) for request in requests.to_pylist()])

    def _answer(self, request: dict) -> dict:
        if self._fails_once_kept_in is not None and request["request"] >= 3:
            wait_for_a_file(self._fails_once_kept_in, "prompts")
            raise RuntimeError("the language model went away")
        if self._first_image_in is not None and request["request"] >= 2:
            wait_for_a_file(self._first_image_in, "images")
        time.sleep(random.random() * self._longest_delay_s)
        rng = random.Random(f"{request['seed']} {request['text']}")
        captions = [" ".join(rng.choices(WORDS, k=rng.randint(4, 13))) for _ in range(6)]
        answer = "\n".join([f" {captions[0]}", *(f"{number}. {text}" for number, text in enumerate(captions[1:], 4))])
        return {"skill": request["skill"], "request": request["request"], "answer": answer, "truncated": False}


def wait_for_a_file(folder: RunFolder, kind: str, timeout_s: float = 300) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not folder.files(kind):
        assert time.monotonic() < deadline_s, f"none of the {kind} is written while requests are still to be answered"
        time.sleep(0.2)


def language_model(replicas: int = 1, batch_size: int = 1, **options: Any) -> Any:
    def stage(requests: Any) -> Any:
        return requests.map_batches(
            AnswerRequests,
            fn_constructor_kwargs=options,
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=replicas),
            num_cpus=0.1,
        )

    return stage


def unused_language_model(requests: Any) -> None:
    raise AssertionError("no request is left to be answered")


def stream(folder: RunFolder, llm_stage: Any = unused_language_model, config: PromptsConfig = PROMPTS) -> Any:
    return prompt_stream(SKILLS, config, 0, folder, CLUSTER, llm_stage=llm_stage)


def kept(folder: RunFolder) -> list[dict]:
    return [row for skill in SKILLS for row in read_prompts(folder, skill.name).to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what a run keeps whose answers come at once, one by one."""
    folder = RunFolder(str(tmp_path_factory.mktemp("undisturbed")))
    rows = stream(folder, language_model()).take_all()
    prompts = kept(folder)
    assert sorted(rows, key=lambda row: (row["skill"], row["index"])) == prompts
    assert [row["index"] for row in prompts] == [*range(20), *range(20)]
    return prompts


def test_latencies_and_pool_sizes_do_not_change_the_prompts(folder: RunFolder, undisturbed: list[dict]) -> None:
    stream(folder, language_model(replicas=3, longest_delay_s=0.3)).materialize()
    assert kept(folder) == undisturbed


def test_a_larger_window_streams_in_whole_batches_to_its_end(folder: RunFolder) -> None:
    config = PROMPTS.model_copy(update={"requests_in_flight": 8})
    stream(folder, language_model(batch_size=2), config).materialize()
    assert len(kept(folder)) == 40


def test_a_stopped_run_goes_on_to_the_same_prompts(folder: RunFolder, undisturbed: list[dict]) -> None:
    with pytest.raises(Exception, match="went away"):
        stream(folder, language_model(fails_once_kept_in=folder)).materialize()
    before = kept(folder)
    assert 0 < len(before) < len(undisturbed)
    rows = stream(folder, language_model()).take_all()
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in undisturbed)
    assert kept(folder) == undisturbed
    assert [row for row in before if row not in undisturbed] == []


def test_a_skill_that_cannot_be_filled_ends_the_stream_with_its_yield(folder: RunFolder) -> None:
    config = PROMPTS.model_copy(update={"max_requests": 2})
    with pytest.raises(Exception, match=r"kept \d+ of 20 prompts in prompts.max_requests=2 requests"):
        stream(folder, language_model(), config).materialize()


def test_a_second_start_sends_what_is_unfinished_through_the_stream_alone(folder: RunFolder) -> None:
    def last(prompts: pa.Table) -> pa.Table:
        return prompts.slice(prompts.num_rows - count)

    stream(folder, language_model()).materialize()
    for count in (3, 0):
        again = prompt_stream(SKILLS, PROMPTS, 0, folder, CLUSTER, unfinished=last).take_all()
        assert [row["id"] for row in again] == read_prompts(folder, SKILLS[-1].name)["id"].to_pylist()[20 - count :]


@pytest.mark.heavy
def test_every_training_prompt_becomes_an_image_and_a_second_start_renders_what_is_lost(
    folder: RunFolder, tiny_pipeline_dir: Path
) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    # Later requests are answered only when the first image is finished: a barrier between the two would end in an error.
    prompts = stream(folder, language_model(first_image_in=folder))
    rows = list(render_stream(prompts, IMAGES, model, 0, folder, CLUSTER).iter_rows())
    count = train_count(PROMPTS)
    assert prompt_summary(folder, ["one", "two"])["kept"] == 40
    assert image_summary(folder, ["one", "two"])["rendered"] == 2 * count == len(rows)
    assert all(row["error"] is None and row["seconds"] > 0 for row in rows)
    for skill in SKILLS:
        train = read_prompts(folder, skill.name, "train")["prompt"].to_pylist()
        assert sorted(read_images(folder, skill.name)["prompt"].to_pylist()) == sorted(train)

    # A second start finds nothing to write and renders only what is lost.
    files = folder.files()
    assert render_stream(stream(folder), IMAGES, model, 0, folder, CLUSTER).take_all() == []
    assert folder.files() == files
    folder.delete(folder.files("images", "skill=one")[0])
    again = render_stream(stream(folder), IMAGES, model, 0, folder, CLUSTER).take_all()
    assert {row["skill"] for row in again} == {"one"}
    assert folder.files("images", "skill=two") == [path for path in files if path.startswith("images/skill=two")]
    assert image_summary(folder, ["one", "two"])["rendered"] == 2 * count


@pytest.mark.heavy
def test_vllm_writes_captions_inside_the_grammar(folder: RunFolder) -> None:
    from selma_ray.miniature.captions import parse_caption
    from selma_ray.skills import load_skill

    config = PromptsConfig(
        per_skill=8, per_request=6, requests_in_flight=2, max_requests=30, llm=LLMConfig(max_tokens=400)
    )
    prompt_stream([load_skill("miniature/common")], config, 0, folder, CLUSTER).materialize()
    captions = read_prompts(folder, "common")["prompt"].to_pylist()
    assert len(captions) == 8
    for caption in captions:
        parse_caption(caption)
