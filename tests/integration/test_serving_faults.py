"""The service under more load than it holds, and while its replicas are killed, replaced and given other weights."""

import base64
import io
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from ray import cloudpickle, serve

from selma_ray.adapters.mixing import Expert
from selma_ray.cluster.config import ClusterConfig
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.sources import GrammarQuestions
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.batch import Failure, StepBatch
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.decoding import Latents
from selma_ray.serving.evaluator import Asked
from selma_ray.serving.experts import open_experts
from selma_ray.serving.run import Service, start_service
from selma_ray.serving.scorer import open_scorer
from selma_ray.serving.served import ServedModels
from tests.tiny_experts import save_experts

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.heavy]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

OVERLOAD_S = float(os.environ.get("SELMA_OVERLOAD_S", "120"))
STALL_S = 15.0
BODY = {"prompt": "two blue bananas to the left of a red car", "num_inference_steps": 4, "seed": 1}
CONFIG = ServingConfig(
    port=0, sampling=SamplingConfig(steps=4, guidance_scale=3.0, width_px=64, height_px=64), max_steps=500,
    max_batch_size=4, max_queued_requests=8, num_threads=1, request_timeout_s=90, num_cpus=0.25, generator_replicas=2,
    stall_timeout_s=STALL_S,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedModels:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    folders = save_experts(load_pipeline(model, "cpu"), tmp_path_factory.mktemp("experts"))
    return ServedModels("tiny", model, model, folders)


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that, once it is there, sticks the engine of the replica that is the first to take it away."""
    return tmp_path_factory.mktemp("trap") / "trap"


def open_experts_beside_a_trap(
    trap: Path, folders: Mapping[str, str], denoiser: Any, pipeline_class: Any
) -> Mapping[str, Expert]:
    """Read experts in a replica, and let its engine fall into the trap."""
    step = StepBatch.step

    def step_or_stick(self: StepBatch) -> list[Latents | Failure]:
        taken = trap.with_suffix(f".{os.getpid()}")
        with suppress(FileNotFoundError):
            trap.rename(taken)
        while taken.exists():
            time.sleep(0.2)
        return step(self)

    StepBatch.step = step_or_stick  # type: ignore[method-assign]
    return open_experts(folders, denoiser, pipeline_class)


@pytest.fixture(scope="module")
def service(ray_cluster: None, models: ServedModels, trap: Path) -> Iterator[Service]:
    with_trap = partial(open_experts_beside_a_trap, trap)
    running = start_service(
        models, CONFIG, ClusterConfig(), partial(open_scorer, JudgeConfig(), {}, GrammarQuestions()), with_trap
    )
    yield running
    running.stop()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=service.url, timeout=120, limits=limits, trust_env=False) as client:
        yield client


def draw(http: httpx.Client, **changes: Any) -> httpx.Response:
    return http.post("/v1/images/generations", json=BODY | changes)


def replicas(what: str) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas, by the title that Ray gives them."""
    title = f"ServeReplica:selma:{what}"
    return [process for process in psutil.Process().children(recursive=True) if title in " ".join(process.cmdline())]


def under_load(http: httpx.Client, clients: int, disturb: Any) -> list[httpx.Response]:
    """Send requests from several clients, one after another, until `disturb` has returned; returns all answers."""
    ended = threading.Event()

    def client(_: int) -> list[httpx.Response]:
        answers = [draw(http)]
        while not ended.is_set():
            answers.append(draw(http))
        return answers

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, index) for index in range(clients)]
        try:
            disturb()
        finally:
            ended.set()
        return [answer for future in futures for answer in future.result()]


def picture(answer: httpx.Response) -> np.ndarray:
    content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)), dtype=int)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two images are one, but for what the other images of a batch change in the last bits."""
    return bool(np.abs(one - other).max() <= 1)


def wait_for_replicas(http: httpx.Client) -> None:
    deadline_s = time.monotonic() + 120
    while http.get("/metrics").text.count("selma_engine_start_seconds{") < CONFIG.generator_replicas:
        assert time.monotonic() < deadline_s, "a replica that was killed is not replaced"
        time.sleep(1)


def memory_of_generators() -> int:
    return sum(process.memory_info().rss for process in replicas("generator"))


def test_ten_times_more_than_it_holds(http: httpx.Client) -> None:
    whole = picture(draw(http))
    refusal_seconds: list[float] = []
    memory_by_time: list[int] = []
    began_s = time.monotonic()

    def client(_: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        while time.monotonic() < began_s + OVERLOAD_S:
            started_s = time.monotonic()
            answer = draw(http, num_inference_steps=40)
            statuses[answer.status_code] += 1
            if answer.status_code == 429:
                refusal_seconds.append(time.monotonic() - started_s)
                time.sleep(int(answer.headers["Retry-After"]))
        return statuses

    def watch() -> None:
        while time.monotonic() < began_s + OVERLOAD_S:
            memory_by_time.append(memory_of_generators())
            time.sleep(OVERLOAD_S / 20)

    clients = 10 * CONFIG.generator_replicas * (CONFIG.max_batch_size + CONFIG.max_queued_requests) // 2
    with ThreadPoolExecutor(clients + 1) as pool:
        watching = pool.submit(watch)
        statuses = sum(pool.map(client, range(clients)), Counter())
        watching.result()
    # Whatever was accepted is answered, everything else is told when to come back.
    assert statuses.keys() == {200, 429}, statuses
    assert sorted(refusal_seconds)[int(0.95 * len(refusal_seconds))] < 1
    # The first batches of a size make room that is kept; from then on nothing grows.
    assert memory_by_time[-1] < memory_by_time[len(memory_by_time) // 4] + 50e6, memory_by_time
    started_s = time.monotonic()
    assert same(picture(draw(http)), whole)
    assert time.monotonic() - started_s < 10


def test_a_stuck_engine_is_noticed_and_what_it_had_accepted_is_drawn_by_another(http: httpx.Client, trap: Path) -> None:
    wait_for_replicas(http)
    whole = picture(draw(http))
    before = {process.pid for process in replicas("generator")}

    def stick() -> None:
        trap.touch()
        deadline_s = time.monotonic() + 60 + STALL_S
        while before <= {process.pid for process in replicas("generator")}:
            assert time.monotonic() < deadline_s, "a replica whose engine is stuck lives on"
            time.sleep(1)

    answers = under_load(http, 4, stick)
    assert Counter(answer.status_code for answer in answers).keys() == {200}
    assert all(same(picture(answer), whole) for answer in answers)
    wait_for_replicas(http)
    (stuck,) = (int(path.suffix[1:]) for path in trap.parent.iterdir())
    assert stuck in before - {process.pid for process in replicas("generator")}


def test_no_accepted_request_is_lost_when_a_replica_is_killed(http: httpx.Client) -> None:
    whole = picture(draw(http))

    def kill() -> None:
        time.sleep(2)
        victim = replicas("generator")[0]
        victim.kill()
        time.sleep(5)

    answers = under_load(http, 6, kill)
    assert Counter(answer.status_code for answer in answers).keys() == {200}
    assert all(same(picture(answer), whole) for answer in answers)


def test_generation_goes_on_without_an_evaluator(http: httpx.Client) -> None:
    image = draw(http).json()["data"][0]["b64_json"]
    score = {"prompt": BODY["prompt"], "image": image}
    before = http.post("/v1/scores", json=score).json()
    for process in replicas("evaluator"):
        process.send_signal(signal.SIGKILL)
    assert draw(http).status_code == 200
    during = http.post("/v1/scores", json=score)
    assert during.status_code in (200, 503)
    deadline_s = time.monotonic() + 60
    while (after := http.post("/v1/scores", json=score)).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(1)
    assert after.json()["data"][0]["scores"] == before["data"][0]["scores"]


def test_online_scores_equal_offline_ones(http: httpx.Client) -> None:
    scorer = open_scorer(JudgeConfig(), {}, GrammarQuestions())
    contents = [draw(http, seed=seed).json()["data"][0]["b64_json"] for seed in range(3)]
    body = {"prompt": BODY["prompt"], "images": contents, "metrics": list(scorer.metrics)}
    online = http.post("/v1/scores", json=body).json()["data"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in contents]
    prompt, questions = str(BODY["prompt"]), scorer.questions(str(BODY["prompt"]))
    offline = scorer.score([Asked(picture, prompt, scorer.metrics, questions) for picture in pictures])
    for mine, theirs in zip(online, offline, strict=True):
        assert mine["scores"] == pytest.approx({name: theirs.scores[name] for name in scorer.metrics}, abs=1e-4)
        assert [each["answer"] for each in mine["questions"]] == [each.answer for each in theirs.questions]


def test_other_merged_weights_come_without_a_restart_and_without_a_lost_request(
    http: httpx.Client, models: ServedModels
) -> None:
    wait_for_replicas(http)
    old, new = picture(draw(http)), picture(draw(http, model="counting"))
    before = {process.pid for process in replicas("generator")}

    def swap() -> None:
        time.sleep(1)
        response = serve.get_deployment_handle("generator", "selma").broadcast(
            "reconfigure", {"adapter": models.experts["counting"]}
        )
        assert response.results(timeout_s=60) == [None, None]

    answers = under_load(http, 4, swap)
    assert Counter(answer.status_code for answer in answers).keys() == {200}
    assert all(same(picture(answer), old) or same(picture(answer), new) for answer in answers)
    assert same(picture(draw(http)), new)
    assert not same(old, new)
    assert {process.pid for process in replicas("generator")} == before


def test_slow_and_broken_clients_hold_nobody_up(service: Service, http: httpx.Client) -> None:
    port = int(service.url.rpartition(":")[2])
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    half = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in half:
        connection.sendall(head + b'{"prompt":')
    assert draw(http).status_code == 200
    for connection in half[:10]:
        connection.shutdown(socket.SHUT_WR)
    for connection in half:
        connection.close()
    assert draw(http).status_code == 200
    assert http.get("/readyz").status_code == 200
