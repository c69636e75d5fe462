"""The stream of prompts with the stand-in engine: the same prompts whatever its speed, its replicas and what dies of it."""

import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.data import ActorPoolStrategy

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import LLMError
from selma_ray.miniature.captions import parse_caption
from selma_ray.prompts import free
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.llm import llm_errors
from selma_ray.prompts.stream import prompt_stream, prompt_summary, read_prompts
from selma_ray.records import seed_of
from selma_ray.skills import Skill, SkillSampling, load_skill
from selma_ray.storage import RunFolder

SKILLS = [
    Skill(name=name, description="things", max_words=12, seeds=("a red apple", "two cups")) for name in ("one", "two")
]
CONFIG = PromptsConfig(
    per_skill=40, per_request=6, requests_in_flight=4, max_requests=40, llm=LLMConfig(engine="free", num_cpus=0.1)
)

# Ray's workers cannot import this file: what it defines goes to them by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("ray_cluster")


class AnswerByText(free.AnswerAtNoCost):
    """Answers otherwise when other examples are shown, as a language model does."""

    def __call__(self, requests: pa.Table) -> pa.Table:
        rows = [{**row, "seed": seed_of(row["seed"], text=row["text"])} for row in requests.to_pylist()]
        return super().__call__(pa.Table.from_pylist(rows))


class KilledOnce(AnswerByText):
    """Answers after a delay that differs from call to call; the first process that comes to request 3 is killed there."""

    sign = ""

    def __call__(self, requests: pa.Table) -> pa.Table:
        time.sleep(random.random() * 0.2)
        if max(requests["request"].to_pylist()) >= 3 and not Path(self.sign).exists():
            Path(self.sign).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(requests)


class AnswerAtNoCostDies(free.AnswerAtNoCost):
    """An engine that cannot answer request 2."""

    def __call__(self, requests: pa.Table) -> pa.Table:
        if max(requests["request"].to_pylist()) >= 2:
            os._exit(1)
        return super().__call__(requests)


def write(folder: RunFolder, llm_stage: Any = None, **llm: Any) -> list[dict]:
    """Run the stream with other settings of the engine; returns what was kept, in order."""
    config = CONFIG.model_copy(update={"llm": CONFIG.llm.model_copy(update=llm)})
    with llm_errors(config.llm):
        prompt_stream(SKILLS, config, 0, folder, ClusterConfig(), llm_stage=llm_stage).materialize()
    return [row for skill in SKILLS for row in read_prompts(folder, skill.name).to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what one replica writes that answers at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free, "AnswerAtNoCost", AnswerByText)
        prompts = write(RunFolder(str(tmp_path_factory.mktemp("undisturbed"))))
    assert [row["index"] for row in prompts] == [*range(40), *range(40)]
    return prompts


def test_a_killed_replica_among_others_does_not_change_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict]
) -> None:
    sign = tmp_path / "killed"
    monkeypatch.setattr(KilledOnce, "sign", str(sign))
    monkeypatch.setattr(free, "AnswerAtNoCost", KilledOnce)
    prompts = write(RunFolder(str(tmp_path / "run")), min_replicas=3, max_replicas=3)
    assert sign.exists()
    assert prompts == undisturbed


def test_an_engine_that_keeps_dying_ends_the_stream_in_one_line(tmp_path: Path) -> None:
    def stage(requests: Any) -> Any:
        return requests.map_batches(
            AnswerAtNoCostDies,
            fn_constructor_args=(SKILLS, CONFIG),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=0.1,
            max_restarts=1,
        )

    with pytest.raises(LLMError, match=r"died again after prompts.llm.max_restarts=1 restarts.*raise max_restarts"):
        write(RunFolder(str(tmp_path / "run")), stage, max_restarts=1)


@pytest.mark.heavy
def test_vllm_is_asked_in_the_chat_form_with_each_skills_own_sampling(tmp_path: Path) -> None:
    inside = load_skill("miniature/common").model_copy(update={"sampling": SkillSampling(top_k=50, max_tokens=300)})
    skills = [inside, load_skill("coco")]
    config = PromptsConfig(
        per_skill=4, per_request=4, requests_in_flight=2, max_requests=30, llm=LLMConfig(chat=True, max_tokens=200)
    )
    folder = RunFolder(str(tmp_path / "run"))
    prompt_stream(skills, config, 0, folder, ClusterConfig()).materialize()
    captions = read_prompts(folder, "common")["prompt"].to_pylist()
    assert len(captions) == len(read_prompts(folder, "coco")) == 4
    for caption in captions:
        parse_caption(caption)
    assert "unparsed" not in prompt_summary(folder, ["common"])["reasons"]


@pytest.mark.heavy
def test_a_vllm_engine_that_is_killed_again_and_again_ends_the_stream(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    llm = LLMConfig(chat=False, max_tokens=120, max_restarts=1)
    config = PromptsConfig(per_skill=400, per_request=2, requests_in_flight=2, max_requests=1000, llm=llm)
    over = threading.Event()
    killed: list[int] = []

    def kill_engines() -> None:
        """Kill the engine's process each time that it has answered something."""
        answered = 0
        while not over.wait(0.5):
            if len(folder.files("prompts")) <= answered:
                continue
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if process.name().startswith("VLLM::Engine"):
                        process.kill()
                        killed.append(process.pid)
                        answered = len(folder.files("prompts")) + 1

    killer = threading.Thread(target=kill_engines)
    killer.start()
    try:
        with pytest.raises(LLMError, match="max_restarts=1 restarts"), llm_errors(llm):
            prompt_stream([load_skill("miniature/common")], config, 0, folder, ClusterConfig()).materialize()
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2


@pytest.mark.heavy
def test_two_vllm_engines_write_what_one_writes(tmp_path: Path) -> None:
    skill = load_skill("miniature/common")

    def write_with(engines: int) -> list[dict]:
        # In bf16 an answer is rounded otherwise in other company.
        llm = LLMConfig(chat=False, max_tokens=160, dtype="float32", min_replicas=engines, max_replicas=engines)
        config = PromptsConfig(per_skill=24, per_request=3, requests_in_flight=4, max_requests=100, llm=llm)
        folder = RunFolder(str(tmp_path / f"engines-{engines}"))
        prompt_stream([skill], config, 0, folder, ClusterConfig()).materialize()
        return read_prompts(folder, "common").to_pylist()

    alone = write_with(1)
    assert [row["index"] for row in alone] == [*range(24)]
    assert write_with(2) == alone
