"""The large recipes on GPUs that exist for scheduling alone: where roles are placed is real, what they compute is small and on the CPU.

A tiny pipeline stands in for the recipe's model and a tiny VQA model for its judge; prompts and training images cost nothing. Every
stage, its processes and what they reserve are the recipe's own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from selma_ray.config import read_yaml
from selma_ray.run.demands import SERVE, stage_demands
from selma_ray.run.published import published_recipes
from selma_ray.run.recipe import load_recipe
from selma_ray.run.stages import STAGES
from tests.e2e.conftest import REPOSITORY
from tests.local_ray import ENVIRONMENT, RayNode, free_port, own_address, wait_until
from tests.unit.judging.tiny_judges import save_tiny_vilt

LARGE = [
    name
    for name, path in published_recipes().items()
    if "arms" not in read_yaml(path) and load_recipe(path).model.name != "miniature"
]
QUICK = {("sdxl", 1), ("sdxl", 8), ("workstation", 1)}
"""Run at every change; each of the others places its work as one of these does, which is tested, too."""
_STORE = "--object-store-memory=150000000"
SIZE = "width_px: 64, height_px: 64"


@pytest.fixture(scope="module")
def stand_ins(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that put small things in the place of large ones, and change no placement."""
    folder = tmp_path_factory.mktemp("stand-ins")
    question = {"id": 1, "category": "whole", "question": "is there a cup ?", "parents": []}
    suite = [{"id": str(n), "skill": "coco", "prompt": f"{n} cups", "questions": [question]} for n in range(3)]
    (folder / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in suite))
    judge = f"judge.name={save_tiny_vilt(folder / 'judge')}", "judge.engine=transformers"
    return [
        "cluster.logical_gpus=true", "skills=[coco, whoops]", f"model.name={tiny_pipeline_dir}", "model.dtype=fp32", "model.vae=null",
        "prompts.llm.engine=free", "prompts.per_skill=4", "prompts.per_request=4", "prompts.requests_in_flight=2",
        "images.engine=free", f"images.sampling={{steps: 1, {SIZE}}}", "experts.steps=2", "experts.batch_size=2",
        "experts.micro_batch_size=1", "experts.precision=fp32", "experts.lora={rank: 2, alpha: 2}", "experts.cpus_per_worker=0.5",
        f"evaluation.suite={folder / 'suite.jsonl'}", "evaluation.max_prompts=null", f"evaluation.sampling={{steps: 1, {SIZE}}}",
        *(f"{section}.{each}" for section in ("evaluation", "serving") for each in judge),
        "serving.port=0", f"serving.sampling={{steps: 2, {SIZE}}}",
    ]  # fmt: skip


def selma(recipe: str, *overrides: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "selma_ray.cli", "run", f"jobs/recipes/{recipe}.yaml", *overrides]
    return subprocess.run(
        words, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1500
    )


def on_machine(gpus: int) -> dict[str, str]:
    return {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": max(4, gpus), "GPU": gpus})}


def check_finished(done: subprocess.CompletedProcess[str], run_dir: Path) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.stem for path in (run_dir / "done").iterdir()} == {"generate", "train", "merge", "evaluate"}
    summary = json.loads((run_dir / "done" / "evaluate.json").read_text())
    assert set(summary["models"]) >= {"base", "merged"}
    assert (run_dir / "served.png").read_bytes().startswith(b"\x89PNG")


def runs_on(recipe: str, gpus: int, stand_ins: list[str], run_dir: Path) -> None:
    done = selma(recipe, f"run_dir={run_dir}", *stand_ins, environment=on_machine(gpus))
    check_finished(done, run_dir)
    if gpus == 1:
        assert "they run one after the other" in done.stderr


def placement(recipe: str) -> tuple[Any, ...]:
    """Return what each stage of a recipe reserves, and how far its pools grow."""
    made = load_recipe(published_recipes()[recipe])
    images, llm, evaluation, experts = made.images, made.prompts.llm, made.evaluation, made.experts
    return (
        [stage_demands(made, stage) for stage in (*STAGES, SERVE)],
        (images.max_renderers, llm.max_replicas, evaluation.renderers, evaluation.judges, made.cluster),
        (experts.workers_per_expert, experts.encoders, experts.max_concurrent, experts.zero_stage, experts.fused),
    )


@pytest.mark.parametrize("recipe", LARGE)
def test_every_recipe_places_its_work_as_one_that_is_run_at_every_change(recipe: str) -> None:
    assert placement(recipe) in [placement(each) for each, _ in QUICK]


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        pytest.param(recipe, gpus, marks=() if (recipe, gpus) in QUICK else pytest.mark.heavy)
        for recipe in LARGE
        for gpus in (1, 8)
    ],
)
def test_every_recipe_runs_on_one_gpu_and_on_eight(
    recipe: str, gpus: int, stand_ins: list[str], tmp_path: Path
) -> None:
    runs_on(recipe, gpus, stand_ins, tmp_path / "run")


@pytest.mark.parametrize("override", ["evaluation.judges=1", "serving.evaluator_num_gpus=1", "images.num_gpus=2"])
def test_what_does_not_fit_is_one_line_before_anything_runs(
    override: str, stand_ins: list[str], tmp_path: Path
) -> None:
    done = selma("sdxl", f"run_dir={tmp_path / 'run'}", *stand_ins, override, environment=on_machine(1))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "1 GPU" in done.stderr
    assert not (tmp_path / "run" / "prompts").exists()


def test_labels_on_one_machine_are_refused_at_once(stand_ins: list[str], tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}", *stand_ins, "cluster.use_labels=true"]
    done = selma("sdxl", *words, environment=on_machine(8))
    assert done.returncode == 2
    assert "no node bears the label role=" in done.stderr


@pytest.fixture
def labelled_cluster(tmp_path: Path) -> Iterator[str]:
    """Start a head without GPUs and a node of one GPU for each role; yield its address."""
    port, host = free_port(), own_address()
    address, log = f"{host}:{port}", tmp_path / "head.log"
    head = [
        "--head", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false", _STORE
    ]  # fmt: skip
    nodes = [RayNode(*head, log=log)]
    try:
        wait_until(lambda: nodes[0].started, log, nodes[0].process)
        for role in ("llm", "render", "train", "serve"):
            words = [f"--address={address}", "--num-cpus=4", "--num-gpus=1", f"--labels=role={role}", _STORE]
            nodes.append(RayNode(*words, log=tmp_path / f"{role}.log"))
            # One after another: five that start at once keep a small machine too long for Ray's patience.
            wait_until(lambda node=nodes[-1]: node.started, tmp_path / f"{role}.log", nodes[-1].process)  # type: ignore[misc]
        yield address
    finally:
        for node in reversed(nodes):
            node.stop()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_recipe_runs_on_a_labelled_cluster_of_one_gpu_nodes(
    labelled_cluster: str, stand_ins: list[str], tmp_path: Path
) -> None:
    words = [f"run_dir={tmp_path / 'run'}", *stand_ins, "cluster.use_labels=true"]
    check_finished(
        selma("sdxl", *words, environment={**ENVIRONMENT, "RAY_ADDRESS": labelled_cluster}), tmp_path / "run"
    )
