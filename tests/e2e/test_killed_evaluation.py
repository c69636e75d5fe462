"""`selma evaluate`, killed on the way and started again, against one that was left alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from selma_ray.miniature.locate import text_to_image_dir
from selma_ray.run.stages import STAGES
from selma_ray.storage import RunFolder
from tests.e2e.conftest import DEMO, REPOSITORY, SMALL

OVERRIDES = [
    *SMALL,
    "evaluation.max_prompts=24",
    "evaluation.batch_size=4",
    "evaluation.experts=false",
    "evaluation.sampling.steps=4",
    "evaluation.seeds=[0, 1]",
    "evaluation.calibration_scenes=20",
]
NUM_IMAGES = 2 * 2 * 24  # two models, two seeds


@pytest.mark.heavy
def test_a_killed_evaluation_ends_with_the_rows_and_figures_of_one_left_alone(selma: Any, tmp_path: Path) -> None:
    killed_dir, alone_dir = (_merged_run(tmp_path / name) for name in ("killed", "alone"))
    process = subprocess.Popen(
        [sys.executable, "-m", "selma_ray.cli", "evaluate", str(DEMO), f"run_dir={killed_dir}", *OVERRIDES],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    _wait_for_answers(killed_dir, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_ino for path in killed_dir.glob("evaluation/*/*/*.parquet")}
    assert 0 < sum(pq.read_metadata(path).num_rows for path in before if path.parent.name == "images") < NUM_IMAGES

    finished = selma("evaluate", f"run_dir={killed_dir}", *OVERRIDES)
    assert finished.returncode == 0, finished.stderr
    assert "merged - base" in finished.stdout
    assert {path: path.stat().st_ino for path in before} == before, "what was finished is not done again"
    assert selma("evaluate", f"run_dir={alone_dir}", *OVERRIDES).returncode == 0
    for kind in ("images", "answers"):
        assert _rows(killed_dir, kind) == _rows(alone_dir, kind)
    assert len(_rows(killed_dir, "images")) == NUM_IMAGES
    summaries = [RunFolder(str(folder)).done("evaluate") for folder in (killed_dir, alone_dir)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["judge_error"]["questions"] > 20
    assert (killed_dir / "report.html").is_file()
    assert "finished before" in selma("evaluate", f"run_dir={killed_dir}", *OVERRIDES).stdout


def _merged_run(folder: Path) -> Path:
    """Lay out a run whose earlier stages are finished: the merged model is the base model under another name."""
    run = RunFolder(str(folder))
    shutil.copytree(text_to_image_dir(), folder / "merged" / "merged" / "pipeline")
    nothing = {"kept": 0, "rejected": 0, "reasons": {}, "rendered": 0, "failed": 0}
    by_skill = {"skills": dict.fromkeys(("common", "counting"), nothing)}
    for stage in list(STAGES)[:-1]:
        run.mark_done(stage, {"prompts": by_skill, "images": by_skill})
    return folder


def _rows(folder: Path, kind: str) -> list[tuple]:
    columns = {
        "images": ["model", "id", "seed", "image"],
        "answers": ["model", "prompt_id", "seed", "question_id", "answer"],
    }
    rows = [
        tuple(str(row[name]) for name in columns[kind])
        for path in folder.glob(f"evaluation/*/{kind}/*.parquet")
        for row in pq.read_table(path, columns=columns[kind]).to_pylist()
    ]
    assert len(rows) == len(set(rows))
    return sorted(rows)


def _wait_for_answers(folder: Path, process: subprocess.Popen, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(folder.glob("evaluation/*/answers/*.parquet")):
        assert process.poll() is None, "the evaluation ended before it could be killed"
        assert time.monotonic() < deadline, "no answer was written in time"
        time.sleep(0.1)
