"""The service against three others (one request at a time, batching of whole requests, an offline batched loop), and under load.

All draw the same requests of mixed step counts on the miniature, with the same batch and one thread each for the model. Then the
service alone: a small image beside large ones, kinds of rows in one batch, and requests that arrive at random at 50 to 110% of what
it can draw.
Run: python -m benchmarks.serving [requests=32] [rounds=3] [minutes=3] [load_s=60], after which no other round begins, for each level
"""

import asyncio
import itertools
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import httpx
import torch
from fastapi import FastAPI, Request
from PIL import Image
from ray import serve

from benchmarks.common import machine, print_result, print_table, read_settings
from benchmarks.serving_parts.kinds import kinds_together, write_experts
from benchmarks.serving_parts.levels import first_over_steady, under_load
from selma_ray.cluster.config import ClusterConfig
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.sources import GrammarQuestions
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, base64_of, encode
from selma_ray.serving.experts import open_experts
from selma_ray.serving.run import start_service
from selma_ray.serving.scorer import open_scorer
from selma_ray.serving.served import ServedModels

CLIENTS = 16
BATCH = 8
STEPS = (5, 10, 15, 20)
SOLO_STEPS = 20
SOLO_CALLS = 15
GUIDANCE = 2.0
PROMPT = "two blue bananas to the left of a red car"
SOLO = {"prompt": PROMPT, "num_inference_steps": SOLO_STEPS, "guidance_scale": GUIDANCE, "seed": 0}
SHORT = {**SOLO, "num_inference_steps": 10}
Body = dict[str, Any]
System = Callable[[Sequence[Body]], float]
"""Draws the bodies' images and returns the seconds it took."""


def main() -> None:
    """Measure all systems in turns and print the table, and the ratios as one JSON line."""
    options = read_settings({"requests": 32, "rounds": 3, "minutes": 3, "load_s": 60})
    load_s = options.pop("load_s")
    print(machine())
    torch.set_num_threads(1)
    config = ServingConfig(
        port=0, max_batch_size=BATCH, num_threads=1, request_timeout_s=600,
        sampling=SamplingConfig(steps=SOLO_STEPS, guidance_scale=GUIDANCE, width_px=64, height_px=64),
    )  # fmt: skip
    model, offline = ModelConfig(), _Offline()
    with TemporaryDirectory() as folder:
        experts = write_experts(offline.pipeline, Path(folder), ["one", "two"])
        _measure(ServedModels("merged", model, model, experts), config, offline, options, load_s)


def _measure(
    models: ServedModels, config: ServingConfig, offline: "_Offline", options: dict[str, int], load_s: int
) -> None:
    started_s = time.monotonic()  # Ray's start and the service's; imports of this program are over
    source = GrammarQuestions()
    service = start_service(
        models, config, ClusterConfig(num_cpus=4), partial(open_scorer, JudgeConfig(), {}, source), open_experts
    )
    starts = {"startup_s": time.monotonic() - started_s}
    url = f"{service.url}/v1/images/generations"
    try:
        starts["first_over_steady"] = first_over_steady(url, SOLO)
        serve.run(_RequestBatching.bind(), name="request_batching", route_prefix="/batched")
        with _one_at_a_time() as alone_url:
            systems: dict[str, System] = {
                "step batching (selma)": partial(_clients, url),
                "offline batched loop": offline.draw,
                "request batching (@serve.batch)": partial(_clients, f"{service.url}/batched"),
                "one at a time (FastAPI)": partial(_clients, alone_url),
            }
            seconds = _measured(systems, **options)
            solo = _solo_latencies(url, offline)
        serve.delete("request_batching")
        ratios = under_load(url, SHORT, load_s, BATCH) | kinds_together(url, SHORT, options["rounds"])
        starts["swap_s"], starts["load_s"] = _swap(service.url)
    finally:
        service.stop()
    _report(seconds, solo, options["requests"], starts, ratios)


def _requests(count: int, seed: int) -> list[Body]:
    steps = list(itertools.islice(itertools.cycle(STEPS), count))
    random.Random(seed).shuffle(steps)
    return [
        {"prompt": PROMPT, "num_inference_steps": number, "guidance_scale": GUIDANCE, "seed": index}
        for index, number in enumerate(steps)
    ]


def _measured(systems: dict[str, System], requests: int, rounds: int, minutes: int) -> dict[str, list[float]]:
    """Return the seconds of each system by round; systems take turns, so that a slow minute hits all of them."""
    for draw in systems.values():
        draw(_requests(len(STEPS), seed=0))
    last_start_s = time.monotonic() + 60 * minutes
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        if number and time.monotonic() > last_start_s:
            break
        for name, draw in systems.items():
            seconds[name].append(draw(_requests(requests, seed=number)))
            print(f"round {number + 1}: {name} {requests / seconds[name][-1]:.2f} images/s", flush=True)
    return seconds


def _clients(url: str, bodies: Sequence[Body]) -> float:
    """Send the bodies over HTTP, as fast as CLIENTS clients get their answers."""
    started_s = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(partial(_post, url), bodies))
    return time.monotonic() - started_s


def _post(url: str, body: Body) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=600) as answer:
        return json.load(answer)


def _drawn(pipeline: Any, bodies: Sequence[Body]) -> list[Image.Image]:
    """Draw bodies of one step count in one call of diffusers' pipeline."""
    return pipeline(
        prompt=[body["prompt"] for body in bodies],
        num_inference_steps=bodies[0]["num_inference_steps"],
        guidance_scale=bodies[0]["guidance_scale"],
        generator=[torch.Generator("cpu").manual_seed(body["seed"]) for body in bodies],
    ).images


class _Offline:
    """The limit: all requests known before, batched by their step counts."""

    def __init__(self) -> None:
        self.pipeline = load_pipeline(ModelConfig(), "cpu")

    def draw(self, bodies: Sequence[Body]) -> float:
        started_s = time.monotonic()
        for _, group in itertools.groupby(sorted(bodies, key=_steps), key=_steps):
            for batch in _batched(group):
                for image in _drawn(self.pipeline, batch):
                    encode(image, PNG)
        return time.monotonic() - started_s


def _steps(body: Body) -> int:
    return body["num_inference_steps"]


def _batched(bodies: Iterator[Body]) -> Iterator[list[Body]]:
    while batch := list(itertools.islice(bodies, BATCH)):
        yield batch


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
class _RequestBatching:
    """Whole requests in one batch; those of different step counts cannot share a call of the pipeline."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._pipeline = load_pipeline(ModelConfig(), "cpu")

    async def __call__(self, request: Any) -> dict[str, str]:
        return {"b64_json": await self._batch(await request.json())}

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.02)
    async def _batch(self, bodies: list[Body]) -> list[str]:
        return await asyncio.to_thread(self._draw, bodies)

    def _draw(self, bodies: list[Body]) -> list[str]:
        images: dict[int, Image.Image] = {}
        for steps in sorted({_steps(body) for body in bodies}):
            indices = [index for index, body in enumerate(bodies) if _steps(body) == steps]
            images |= zip(indices, _drawn(self._pipeline, [bodies[index] for index in indices]), strict=True)
        return [base64_of(encode(images[index], PNG)) for index in range(len(bodies))]


def _serve_one_at_a_time(port: int) -> None:
    """Run the plain server that people begin with: FastAPI, diffusers, a lock."""
    import uvicorn

    torch.set_num_threads(1)
    app, pipeline, lock = FastAPI(), load_pipeline(ModelConfig(), "cpu"), asyncio.Lock()

    @app.post("/")
    async def draw(request: Request) -> dict[str, str]:
        body = await request.json()
        async with lock:
            images = await asyncio.to_thread(_drawn, pipeline, [body])
        return {"b64_json": base64_of(encode(images[0], PNG))}

    uvicorn.run(app, port=port, log_level="error")


@contextmanager
def _one_at_a_time() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.serving", f"serve={port}"])
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            with suppress(OSError):
                _post(url, _requests(1, seed=0)[0])
                break
            assert process.poll() is None, "the plain server did not start"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _solo_latencies(url: str, offline: _Offline) -> dict[str, float]:
    """Return the median seconds of one image, over a kept HTTP connection with nothing else going on and as a bare call, in turns."""
    seconds: dict[str, list[float]] = {"over HTTP": [], "bare pipeline call": []}
    with httpx.Client(timeout=600, trust_env=False) as client:
        for _ in range(SOLO_CALLS):
            started_s = time.monotonic()
            client.post(url, json=SOLO).raise_for_status()
            seconds["over HTTP"].append(time.monotonic() - started_s)
            started_s = time.monotonic()
            _drawn(offline.pipeline, [SOLO])
            seconds["bare pipeline call"].append(time.monotonic() - started_s)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _swap(url: str) -> tuple[float, float]:
    """Change the merged weights of the running generator; returns the seconds of that, and of its first loading."""
    serve.get_deployment_handle("generator", "selma").reconfigure.remote({"pipeline": "miniature"}).result(
        timeout_s=120
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    values = {name.partition("{")[0]: float(value) for name, value in lines.items()}
    return values["selma_engine_swap_seconds"], values["selma_engine_start_seconds"]


def _report(
    seconds: dict[str, list[float]],
    solo: dict[str, float],
    count: int,
    starts: dict[str, float],
    ratios_under_load: dict[str, float],
) -> None:
    ours, *others = seconds
    print_table(
        ("system", "images/s", "the service, times as fast"),
        [
            (name, f"{count / statistics.median(values):.2f}", f"{_ratio(values, seconds[ours]):.2f}")
            for name, values in seconds.items()
        ],
    )
    print_table(("one image", "seconds (median)"), [(name, f"{value:.3f}") for name, value in solo.items()])
    print_table(("start", "seconds"), [(name.removesuffix("_s"), f"{value:.2f}") for name, value in starts.items()])
    keys = dict(zip(("of_offline", "over_request_batching", "over_fastapi"), others, strict=True))
    ratios = {key: round(_ratio(seconds[name], seconds[ours]), 3) for key, name in keys.items()}
    ratios["solo_latency"] = round(solo["over HTTP"] / solo["bare pipeline call"], 3)
    print_result(ratios | {key: round(value, 2) for key, value in (ratios_under_load | starts).items()})


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median over rounds of how many times as fast ours is."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if len(sys.argv) == 2 and sys.argv[1].startswith("serve="):
        _serve_one_at_a_time(int(sys.argv[1].removeprefix("serve=")))
    else:
        main()
