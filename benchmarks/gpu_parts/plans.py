"""What `selma plan` says of each family's training memory, traced on the CPU by a process of its own while the card is measured.

Run by the benchmark: python -m benchmarks.gpu_parts.plans, which reads what to trace from its input
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu_parts.pipelines import Subject
from selma_ray.experts.config import ExpertsConfig
from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import TrainingCost, training_cost
from selma_ray.run.memory import training_memory_parts

__all__ = ["Plans"]

_LIMIT_S = 300


class Plans:
    """The costs of training each subject; tracing begins at once and is waited for when a figure is asked for."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self._costs: dict[str, TrainingCost] = {}
        self._process = _start(subjects)

    def memory_bytes(self, family: str, config: ExpertsConfig) -> float:
        """Return what the plan says that a worker holds; raises RuntimeError where tracing failed."""
        if not self._costs:
            out, err = self._process.communicate(timeout=_LIMIT_S)
            if self._process.returncode:
                raise RuntimeError(
                    f"the plan cannot be traced: {(err.strip().splitlines() or ['no reason given'])[-1]}"
                )
            traced = json.loads(out.splitlines()[-1])
            self._costs = {family: TrainingCost(**cost) for family, cost in traced.items()}
        return sum(training_memory_parts(self._costs[family], config).values())

    def close(self) -> None:
        """Stop tracing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def _start(subjects: Sequence[Subject]) -> "subprocess.Popen[str]":
    wanted = {
        each.family: [
            each.model.name, each.sampling.height_px, each.sampling.width_px, each.experts.lora.rank, each.experts.lora.targets,
        ]
        for each in subjects
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_parts.plans"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(wanted))
    process.stdin.close()
    process.stdin = None  # given already; `communicate` would flush it
    return process


def _main() -> None:
    costs = {}
    for family, (folder, height_px, width_px, rank, targets) in json.load(sys.stdin).items():
        costs[family] = asdict(training_cost(ModelConfig(name=folder), height_px, width_px, rank, tuple(targets)))
    print(json.dumps(costs))


if __name__ == "__main__":
    _main()
