"""The whole demo in a fresh folder: wall time of each stage, peak memory of all its processes, and merged against base.

Run: python -m benchmarks.demo [key.path=value …]
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

DEMO = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"
_SAMPLE_EVERY_S = 2.0
_STAGE_TIME = re.compile(r"✓ (?P<what>.*) \((?P<minutes>\d+) min (?P<seconds>\d+) s\)")
_STAGES = ("generate", "train", "merge", "evaluate")


def main() -> None:
    """Run the demo and print a table for people and one JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        started_s = time.monotonic()
        words = [sys.executable, "-m", "selma_ray.cli", "run", str(DEMO), f"run_dir={run_dir}", *sys.argv[1:]]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        memory = _MemoryWatch(process.pid)
        stage_seconds = []
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := _STAGE_TIME.search(line):
                stage_seconds.append(60 * int(match["minutes"]) + int(match["seconds"]))
        if process.wait() != 0:
            sys.exit(process.returncode)
        wall_s = time.monotonic() - started_s
        difference = json.loads((run_dir / "report.json").read_text())["evaluation"]["difference"]
    result = {
        "wall_s": round(wall_s),
        "stage_s": dict(zip(_STAGES, stage_seconds, strict=True)),
        "peak_memory_gb": round(memory.peak_gb, 1),
        "merged_minus_base": round(difference["mean"], 3),
        "interval": [round(bound, 3) for bound in difference["interval"]],
        "cpus": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
    }
    print("\n| stage | seconds |\n|---|---|")
    for name, seconds in result["stage_s"].items():
        print(f"| {name} | {seconds} |")
    print(f"| all, with start-up, report and serving | {result['wall_s']} |")
    print(json.dumps(result))


class _MemoryWatch:
    """Samples the memory of a process and its descendants, pages shared between them counted once."""

    def __init__(self, pid: int) -> None:
        self.peak_gb = 0.0
        self._root = psutil.Process(pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            self.peak_gb = max(self.peak_gb, self._total_bytes() / 1e9)
            time.sleep(_SAMPLE_EVERY_S)

    def _total_bytes(self) -> int:
        total = 0
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return total


if __name__ == "__main__":
    main()
