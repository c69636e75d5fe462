"""`selma generate` whose processes are killed at random moments; and run again.

Most kills are of a job with the stand-in engines, on a cluster of two nodes: what is tested is everything around an engine.
A few are of a job with vLLM.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selma_ray.images.plan import PlanImages
from selma_ray.judging.suites import open_suite
from selma_ray.prompts.free import AnswerAtNoCost
from selma_ray.prompts.pool import PromptPool, WrittenAnswer
from selma_ray.prompts.store import read_prompts
from selma_ray.run.recipe import load_recipe
from selma_ray.skills import load_skills
from selma_ray.storage import RunFolder
from tests.e2e.conftest import DEMO, REPOSITORY
from tests.local_ray import ENVIRONMENT, RayNode, free_port, own_address, wait_until

SEEDS = int(os.environ.get("FAULT_SEEDS", "2"))
"""Orders and moments of ten kills; ten of them kill the driver, an engine and a node twenty times each."""
BATCH, RENDERERS = 4, 2
SMALL_JOB = [
    "skills=[miniature/common, miniature/counting]",
    "prompts.per_skill=120",
    "prompts.dev_fraction=0.05",
    "prompts.per_request=8",
    "prompts.requests_in_flight=4",
    "prompts.llm.engine=free",
    "prompts.llm.num_cpus=0.25",
    "prompts.llm.max_restarts=100",
    "images.engine=free",
    "images.per_prompt=1",
    "images.selection=null",
    f"images.batch_size={BATCH}",
    f"images.min_renderers={RENDERERS}",
    f"images.max_renderers={RENDERERS}",
    "images.num_cpus=0.25",
]
PLANNED = 2 * (120 - 6)
SLOW = ["images.free.latency_s=1.5", "prompts.llm.free.latency_s=1.0"]
VLLM_PER_SKILL = 80
WITH_VLLM = [
    f"prompts.per_skill={VLLM_PER_SKILL}",
    "prompts.llm.engine=vllm",
    "prompts.llm.num_cpus=1",
    "images.free.latency_s=0.5",
]
# A renderer has four tasks of an answer's prompts (two batches); as many may wait to be written where a start or a node ends.
IN_FLIGHT = 4 * 2 * BATCH
MOST_AGAIN = {
    "driver": 2 * RENDERERS * IN_FLIGHT,
    "node": 2 * RENDERERS * IN_FLIGHT,
    "RenderPrompts": IN_FLIGHT,
    "AnswerAtNoCost": 0,
    "VLLM::Engine": 0,
    "WriteImages": 0,
}


@pytest.fixture(scope="module")
def planned_ids(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the ids of the images that the recipe comes to, from its requests decided one by one, without Ray."""
    recipe = load_recipe(DEMO, SMALL_JOB)
    skills = load_skills(recipe.skills)
    folder = RunFolder(str(tmp_path_factory.mktemp("planned")))
    excluded = [test.prompt for test in open_suite(recipe.evaluation.suite)]
    pool, engine = (
        PromptPool(skills, recipe.prompts, recipe.seed, folder, excluded),
        AnswerAtNoCost(skills, recipe.prompts),
    )
    while not pool.complete:
        (request,) = pool.open_requests(1)
        pool.issue([request])
        row = {"skill": request.skill, "request": request.number, "seed": request.seed}
        asked = pa.Table.from_pylist([{**row, "first_number": len(request.examples) + 1}])
        pool.hand_in(WrittenAnswer(request.skill, request.number, engine(asked)["answer"][0].as_py()))
    prompts = pa.concat_tables(read_prompts(folder, skill.name) for skill in skills)
    ids = PlanImages(recipe.images, recipe.model, recipe.seed)(prompts)["id"].to_pylist()
    assert len(ids) == len(set(ids)) == PLANNED
    return sorted(ids)


class TwoNodes:
    """A head, on which drivers and language models run, and a node for renderers that can be lost."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._temp_dir = folder, Path(f"/tmp/ray_faults_{os.getpid()}")
        port = free_port()
        self.address = f"{own_address()}:{port}"
        self._head = RayNode(
            "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false", f"--temp-dir={self._temp_dir}",
            *self._common("llm"), log=folder / "head.log",
        )  # fmt: skip
        wait_until(lambda: self._head.started, folder / "head.log", self._head.process)
        self._start_worker()

    def processes(self) -> list[psutil.Process]:
        return [*self._head.processes(), *self._worker.processes()]

    def lose_worker(self) -> None:
        """Cut the power of the renderers' node; another one comes."""
        self._worker.kill()
        self._start_worker()

    def stop(self) -> None:
        self._worker.stop()
        self._head.stop()
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _start_worker(self) -> None:
        self._worker = RayNode(
            f"--address={self.address}", "--num-cpus=1", *self._common("render"), log=self._folder / "worker.log"
        )

    @staticmethod
    def _common(role: str) -> list[str]:
        return [
            f"--labels=role={role}", "--object-store-memory=150000000"
        ]  # fmt: skip


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    nodes = TwoNodes(tmp_path)
    yield nodes
    nodes.stop()


class Job:
    """The command as a process that is started again whenever it is killed."""

    def __init__(self, folder: Path, *overrides: str, cluster: TwoNodes | None = None) -> None:
        self.run_dir, self.starts = folder / "run", 0
        self.lost: list[Any] = []
        self._log, self._cluster = folder / "log", cluster
        self._words = [sys.executable, "-m", "selma_ray.cli", "generate", str(DEMO), f"run_dir={self.run_dir}"]
        self._words += [*SMALL_JOB, *SLOW, *overrides]
        self._environment = ENVIRONMENT
        if cluster:
            self._words.append("cluster.use_labels=true")
            self._environment = {**ENVIRONMENT, "RAY_ADDRESS": cluster.address}
        self.start()

    def start(self) -> None:
        self.starts += 1
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._words, cwd=REPOSITORY, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, kind: str, rng: random.Random) -> None:
        """Kill -9 one process of a kind, or a node, once this start has rendered images and a random time has passed.

        Where there is none of the kind any more, the driver is killed. What was finished before is noted.
        """
        wait_until(self._has_images, self._log, self.process)
        time.sleep(rng.uniform(0.0, 3.0))
        found = [pid for pid, words in self._workers() if kind in words]
        self.lost.append(kind if found or kind == "node" else "driver")
        self.finished = self._finished()
        if kind == "node":
            assert self._cluster
            self._cluster.lose_worker()
            return
        os.kill(rng.choice(found or [self.process.pid]), signal.SIGKILL)
        if not found:
            self.process.wait()
            self.start()

    def finish(self) -> None:
        assert self.process.wait(timeout=400) == 0, self._log.read_text()[-3000:]

    def run_again(self) -> str:
        """Return what the command says when it is run once more."""
        done = subprocess.run(
            self._words, cwd=REPOSITORY, env=self._environment, capture_output=True, text=True, timeout=100
        )
        return done.stdout

    def _finished(self) -> set[str]:
        """Return the ids of finished images; a shard that has just been put into a larger one is looked for there."""
        while True:
            try:
                return set(ids_of(self.run_dir))
            except FileNotFoundError:
                continue

    def _has_images(self) -> bool:
        progress = self.progress()
        return progress["starts"] == self.starts and progress["rendered"] > 0

    def progress(self) -> dict:
        """Return the run's own report."""
        path = self.run_dir / "progress" / "generate.json"
        return json.loads(path.read_text()) if path.exists() else {"starts": 0}

    def _workers(self) -> list[tuple[int, str]]:
        of_driver = psutil.Process(self.process.pid).children(recursive=True)
        workers = []
        for process in [*of_driver, *(self._cluster.processes() if self._cluster else ())]:
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if words.startswith(("ray::", "VLLM::")):
                workers.append((process.pid, words))
        return workers


def ids_of(run_dir: Path) -> list[str]:
    paths = (run_dir / "images").rglob("*.parquet")
    return [id_ for path in paths for id_ in pq.ParquetFile(path).read(["id"])["id"].to_pylist()]


def inodes(run_dir: Path) -> dict[Path, int]:
    """Return what tells finished files from others written in their place."""
    return {path: path.stat().st_ino for path in (run_dir / "images").rglob("*.parquet")}


def kill_and_finish(job: Job, kinds: Sequence[str], rng: random.Random, record_property: Callable) -> None:
    """Kill what `kinds` name, one after another; the job comes to its end, and did little again."""
    finished: set[str] = set()
    for kind in kinds:
        job.kill(kind, rng)
        finished |= job.finished
    job.finish()
    progress = job.progress()
    record_property("again", f"{progress['again']} of {progress['total']} images after {', '.join(job.lost)}")
    assert len(job.lost) == len(kinds)
    assert progress["starts"] == job.starts
    assert progress["again"] <= sum(MOST_AGAIN[kind] for kind in job.lost), job.lost
    assert finished <= set(ids_of(job.run_dir)), "a finished image was lost"
    assert not list(job.run_dir.rglob("*.part"))
    assert not list((job.run_dir / "in_flight").rglob("batch-*"))
    files = inodes(job.run_dir)
    assert "finished before" in job.run_again()
    assert inodes(job.run_dir) == files


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_kills_at_random_moments_leave_exactly_the_planned_images(
    tmp_path: Path, two_nodes: TwoNodes, planned_ids: list[str], seed: int, record_property: Any
) -> None:
    rng = random.Random(seed)
    kinds = ["driver"] * 2 + ["AnswerAtNoCost"] * 2 + ["RenderPrompts"] * 3 + ["WriteImages"] + ["node"] * 2
    rng.shuffle(kinds)
    job = Job(tmp_path, cluster=two_nodes)
    kill_and_finish(job, kinds, rng, record_property)
    assert sorted(ids_of(job.run_dir)) == planned_ids, job.lost


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_kills_of_vllm_and_of_its_driver_leave_an_image_of_each_prompt(tmp_path: Path, record_property: Any) -> None:
    job = Job(tmp_path, *WITH_VLLM)
    kill_and_finish(job, ["VLLM::Engine", "driver", "VLLM::Engine"], random.Random(0), record_property)
    # The last kill is of the driver again where the engine has already written everything.
    assert job.lost[:2] == ["VLLM::Engine", "driver"]
    folder = RunFolder(str(job.run_dir))
    for skill in ("common", "counting"):
        prompts = read_prompts(folder, skill)
        assert prompts["index"].to_pylist() == [*range(VLLM_PER_SKILL)]
        assert len(set(prompts["prompt"].to_pylist())) == VLLM_PER_SKILL
    images = ids_of(job.run_dir)
    assert len(images) == len(set(images)) == 2 * (VLLM_PER_SKILL - VLLM_PER_SKILL // 20)


@pytest.mark.heavy
def test_a_killed_driver_and_a_killed_renderer_leave_exactly_the_planned_images(
    tmp_path: Path, planned_ids: list[str], record_property: Any
) -> None:
    fast = ["images.free.latency_s=0.8", "prompts.llm.free.latency_s=0.2"]
    job = Job(tmp_path, *fast)
    kill_and_finish(job, ["RenderPrompts", "driver"], random.Random(0), record_property)
    assert sorted(ids_of(job.run_dir)) == planned_ids
