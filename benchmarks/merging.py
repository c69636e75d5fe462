"""Merging five rank-128 experts of SDXL's attention shapes against PEFT: the mean baked into the dense weights, and its SVD of rank 128.

Run: python -m benchmarks.merging [key=value …], keys and defaults as in SETTINGS

The weights are random, the modules a tenth of SDXL's attention in its proportions: one transformer block 640 wide and six 1280 wide, 56
modules. Each run is a process of its own that starts from the experts' files and ends with the merged file written; ours and PEFT's take
turns, and a figure is the median of its turns. PEFT's way to the same result: load base and experts, then either merge all five into the
weights (`merge_and_unload`, each scaled 1/5) or `add_weighted_adapter("svd", svd_full_matrices=False)`, its faster setting.

`bake_over_peft` and `svd_over_peft` are PEFT's seconds over ours (goal: at least 2); those named `alone` leave reading and writing out.
`max_error` is the largest relative error (Frobenius norm) of a module against float64 (goal: at most 1e-5). Memory is what a process adds
at its peak to what it holds after its imports: its own, and with the pages of files that it has mapped, which the kernel can take back.
"""

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from benchmarks.common import machine, print_result, print_table, read_settings
from selma_ray.adapters.peft_format import LoraFactors, open_adapter, shapes_of, write_adapter
from selma_ray.merging.bake import bake_pipeline
from selma_ray.merging.methods import average_deltas, svd

SETTINGS = {"rounds": 3, "experts": 5, "rank": 128, "narrow_blocks": 1, "wide_blocks": 6, "threads": 1}
_NARROW, _WIDE, _TEXT = 640, 1280, 2048
_SAMPLE_EVERY_S = 0.01
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    """Write random experts, merge them by turns, then print a table and one JSON line."""
    settings = read_settings(SETTINGS)
    print(machine(), settings)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        _in_process(_write_inputs, folder, settings)
        runs = {"bake, ours": _bake, "bake, PEFT": _bake_by_peft, "svd, ours": _svd, "svd, PEFT": _svd_by_peft}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for _ in range(settings["rounds"]):
            for name, run in runs.items():
                turns[name].append(_in_process(run, folder, settings))
        errors = _in_process(_errors, folder, settings)
    medians = {
        name: {key: statistics.median(turn[key] for turn in each) for key in each[0]} for name, each in turns.items()
    }
    print_table(
        ["run", "seconds", "CPU seconds", "seconds, merge alone", "own memory, GB", "with mapped files, GB"],
        [[name, *(f"{figure:.2f}" for figure in each.values())] for name, each in medians.items()],
    )
    ratios = {
        f"{kind}{suffix}_over_peft": round(medians[f"{kind}, PEFT"][key] / medians[f"{kind}, ours"][key], 2)
        for suffix, key in (("", "seconds"), ("_alone", "merge_seconds"))
        for kind in ("bake", "svd")
    }
    memory = {f"{kind}_memory_gb": round(medians[f"{kind}, ours"]["own_memory_gb"], 3) for kind in ("bake", "svd")}
    print_result(ratios | {"max_error": float(f"{max(errors.values()):.1e}")} | memory)


def module_shapes(settings: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every module, named as SDXL's UNet names them."""
    blocks = {f"down_blocks.1.attentions.{number}": _NARROW for number in range(settings["narrow_blocks"])}
    blocks |= {f"mid_block.attentions.{number}": _WIDE for number in range(settings["wide_blocks"])}
    shapes = {}
    for block, width in blocks.items():
        for attention, context in (("attn1", width), ("attn2", _TEXT)):
            for target in ("to_q", "to_k", "to_v", "to_out.0"):
                columns = context if target in ("to_k", "to_v") else width
                shapes[f"{block}.transformer_blocks.0.{attention}.{target}"] = (width, columns)
    return shapes


def _write_inputs(folder: Path, settings: dict[str, int]) -> dict[str, float]:
    shapes, rank = module_shapes(settings), settings["rank"]
    generator = torch.Generator().manual_seed(0)

    def factors() -> Iterator[LoraFactors]:
        for module, (rows, columns) in shapes.items():
            A_RI = torch.randn(rank, columns, generator=generator) / columns**0.5
            yield LoraFactors(module, A_RI, torch.randn(rows, rank, generator=generator) * 0.02, 1.0)

    for expert in _expert_folders(folder, settings):
        write_adapter(expert, factors(), shapes, rank, base_model=None)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.03 for name, shape in shapes.items()}
    (folder / "base" / "unet").mkdir(parents=True)
    save_file(weights, folder / "base" / "unet" / _WEIGHTS)
    (folder / "base" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    return {}


def _expert_folders(folder: Path, settings: dict[str, int]) -> list[Path]:
    return [folder / "experts" / str(number) for number in range(settings["experts"])]


class _Timer:
    """Adds up the seconds spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started_s


def _bake(folder: Path, settings: dict[str, int], merging: _Timer) -> None:
    adapters = [open_adapter(expert) for expert in _expert_folders(folder, settings)]
    mean = [1 / len(adapters)] * len(adapters)

    class Timed:
        """A merged module whose sum with its weight is timed."""

        def __init__(self, experts: list[LoraFactors]) -> None:
            self.experts = experts

        def added_to(self, weight_OI: torch.Tensor) -> torch.Tensor:
            with merging:
                return average_deltas(self.experts, mean).added_to(weight_OI)

    def merged(module: str) -> Any:
        return Timed([adapter.factors(module) for adapter in adapters])

    bake_pipeline(folder / "base", folder / "baked", shapes_of(adapters), merged, torch.float32)


def _svd(folder: Path, settings: dict[str, int], merging: _Timer) -> None:
    adapters = [open_adapter(expert) for expert in _expert_folders(folder, settings)]
    mean = [1 / len(adapters)] * len(adapters)

    def merged() -> Iterator[LoraFactors]:
        for module in shapes:
            experts = [adapter.factors(module) for adapter in adapters]
            with merging:
                result = svd(experts, mean, settings["rank"])
            yield result

    shapes = shapes_of(adapters)
    write_adapter(folder / "svd", merged(), shapes, settings["rank"], base_model=None)


def _loaded_by_peft(folder: Path, settings: dict[str, int]) -> PeftModel:
    base = _empty_modules(module_shapes(settings))
    base.load_state_dict(load_file(folder / "base" / "unet" / _WEIGHTS), assign=True)
    first, *others = _expert_folders(folder, settings)
    # Without low_cpu_mem_usage PEFT would draw every factor at random before it loads it.
    model = PeftModel.from_pretrained(base, first, adapter_name=first.name, low_cpu_mem_usage=True)
    for expert in others:
        model.load_adapter(expert, adapter_name=expert.name, low_cpu_mem_usage=True)
    return model


def _empty_modules(shapes: dict[str, tuple[int, int]]) -> torch.nn.Module:
    root = torch.nn.Module()
    with torch.device("meta"):
        for name, (rows, columns) in shapes.items():
            *parents, leaf = name.split(".")
            node = root
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, torch.nn.Module())
                node = getattr(node, parent)
            node.add_module(leaf, torch.nn.Linear(columns, rows, bias=False))
    return root


@torch.no_grad()
def _bake_by_peft(folder: Path, settings: dict[str, int], merging: _Timer) -> None:
    model = _loaded_by_peft(folder, settings)
    names = [expert.name for expert in _expert_folders(folder, settings)]
    with merging:
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                for name in names:
                    layer.set_scale(name, 1 / len(names))
        merged = model.merge_and_unload(adapter_names=names)
    save_file(merged.state_dict(), folder / "baked-by-peft.safetensors")


@torch.no_grad()
def _svd_by_peft(folder: Path, settings: dict[str, int], merging: _Timer) -> None:
    model = _loaded_by_peft(folder, settings)
    names = [expert.name for expert in _expert_folders(folder, settings)]
    with merging:
        model.add_weighted_adapter(
            names, [1 / len(names)] * len(names), "merged", "svd", svd_rank=settings["rank"], svd_full_matrices=False
        )
    model.save_pretrained(folder / "svd-by-peft", selected_adapters=["merged"])


def _errors(folder: Path, settings: dict[str, int]) -> dict[str, float]:
    """Return the relative error of one module of each shape against float64, for both merges."""
    adapters = [open_adapter(expert) for expert in _expert_folders(folder, settings)]
    base, baked = (load_file(folder / name / "unet" / _WEIGHTS) for name in ("base", "baked"))
    cut = open_adapter(folder / "svd")
    errors = {}
    for shape in set(module_shapes(settings).values()):
        module = next(name for name, other in module_shapes(settings).items() if other == shape)
        experts = [adapter.factors(module) for adapter in adapters]
        mean_OI = sum(each.scale * each.B_OR.double() @ each.A_RI.double() for each in experts) / len(experts)
        errors[f"bake {shape}"] = _relative(
            baked[f"{module}.weight"].double() - base[f"{module}.weight"].double(), mean_OI
        )
        U, values, V = torch.linalg.svd(mean_OI, full_matrices=False)
        best_OI = (U[:, : cut.rank] * values[: cut.rank]) @ V[: cut.rank]
        factors = cut.factors(module)
        errors[f"svd {shape}"] = _relative(factors.B_OR.double() @ factors.A_RI.double(), best_OI)
    return errors


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _in_process(run: Callable[..., Any], folder: Path, settings: dict[str, int]) -> dict[str, float]:
    """Run in a forked process and return its figures: nothing of one run warms or fills the memory of the next."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_run, args=(run, folder, settings, sender))
    process.start()
    sender.close()
    figures = receiver.recv()
    process.join()
    return figures


def _report_run(run: Callable[..., Any], folder: Path, settings: dict[str, int], sender: Any) -> None:
    torch.set_num_threads(settings["threads"])
    os.sync()  # what the run before wrote is not written out during this one
    if run in (_write_inputs, _errors):
        sender.send(run(folder, settings))
        return
    merging = _Timer()
    before_gb, own = psutil.Process().memory_info().rss / 1e9, _OwnMemory()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    run(folder, settings, merging)
    seconds, cpu_seconds = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - before_gb
    sender.send(
        {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "merge_seconds": merging.seconds,
            "own_memory_gb": own.added_gb(),
            "memory_gb": memory_gb,
        }
    )


class _OwnMemory:
    """Samples the memory of this process that no file backs."""

    def __init__(self) -> None:
        self._first_kb = self._peak_kb = self._anonymous_kb()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def added_gb(self) -> float:
        """Return the peak so far above the first sample, and sample no more."""
        self._ended.set()
        self._thread.join()
        return (self._peak_kb - self._first_kb) * 1024 / 1e9

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            self._peak_kb = max(self._peak_kb, self._anonymous_kb())

    @staticmethod
    def _anonymous_kb() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main()
