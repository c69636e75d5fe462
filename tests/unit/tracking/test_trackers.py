"""Each tracker by its real client, offline, and read back by that client's own reader."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selma_ray.errors import ConfigError
from selma_ray.storage import RunFolder
from selma_ray.tracking.names import TrackerName
from selma_ray.tracking.opening import check_trackers, open_tracker
from selma_ray.tracking.tracker import PROJECT, TrackedRun

pytestmark = pytest.mark.filterwarnings("ignore")  # what clients say to one another is not ours to change

SECRET = "5ec7e7" * 6 + "5ec7"
SAMPLES = {"two cats": Image.new("RGB", (8, 8), (200, 0, 0)), "a dog": Image.new("RGB", (8, 8), (0, 0, 200))}
SETTINGS = {"model": "miniature", "experts": {"steps": 3, "optimizer": "adamw"}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun(RunFolder(str(tmp_path / "run")), "experts/counting", "counting", "0a1b2c3dtrain", 0, SETTINGS)


def track(name: TrackerName, run: TrackedRun) -> None:
    """Log three steps with a kill after the second, which is logged again, as a start that was resumed does."""
    tracker = open_tracker(name, run)
    for step, loss in ((1, 3.0), (2, 9.0)):
        tracker.log({"train/loss": loss, "train/learning_rate": 0.5}, step)
    tracker.keep()
    tracker.close()
    time.sleep(1.1)  # Weights & Biases' client names an offline start by its second, and no run is resumed within one
    resumed = TrackedRun(run.folder, run.directory, run.name, run.key, steps_done=1, settings=run.settings)
    tracker = open_tracker(name, resumed)
    for step, loss in ((2, 2.0), (3, 1.0)):
        tracker.log({"train/loss": loss, "train/learning_rate": 0.5}, step)
    tracker.log_images(SAMPLES, 3)
    tracker.close()


def assert_no_secret(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_tensorboard(run: TrackedRun, tmp_path: Path, capfd: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", run)
    events = EventAccumulator(str(tmp_path / "run/experts/counting/tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert events.Tags()["images"] == ["samples/two cats", "samples/a dog"]
    assert_no_secret(tmp_path, capfd)


def test_wandb(run: TrackedRun, tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases' client is not installed: the extra `trackers`")
    track("wandb", run)
    records = [record for path in finished_runs(tmp_path / "run/wandb") for record in wandb_records(path)]
    opened = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(each.run_id, each.display_name, each.project, each.run_group) for each in opened} == {
        ("0a1b2c3dtrain", "counting", PROJECT, "run")
    }
    assert "optimizer" in str(opened[0].config)
    rows = [dict(wandb_row(record)) for record in records if record.WhichOneof("record_type") == "history"]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert sorted(losses) == [(1, 3.0), (2, 2.0), (2, 9.0), (3, 1.0)]
    assert [row["samples/captions"] for row in rows if "samples/captions" in row] == [list(SAMPLES)]
    assert len(list((tmp_path / "run/wandb").rglob("media/images/*.png"))) == 2
    assert_no_secret(tmp_path, capfd)


def finished_runs(folder: Path) -> list[Path]:
    """Return the two starts' files when they are whole: the client's own process writes on for a moment after a run is finished."""

    def is_whole(path: Path) -> bool:
        return [record.WhichOneof("record_type") for record in wandb_records(path)][-1:] == ["exit"]

    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        paths = sorted(folder.rglob("*.wandb"))
        if len(paths) == 2 and all(map(is_whole, paths)):
            return paths
        time.sleep(0.1)
    pytest.fail(f"no two whole runs in {folder}: {paths}")


def wandb_records(path: Path) -> Any:
    """Yield the records of an offline run: its file is a log in LevelDB's format, after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # a block's end, filled up
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_row(record: Any) -> Any:
    for item in record.history.item:
        yield "/".join(item.nested_key) or item.key, json.loads(item.value_json)


@pytest.mark.parametrize("store", ["database", "files"])
def test_mlflow(run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, store: str) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="MLflow's client is not installed: the extra `trackers`")
    place = f"sqlite:///{tmp_path}/run/mlflow/mlflow.db"
    if store == "files":
        place = (tmp_path / "mlruns").as_uri()
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    track("mlflow", run)
    client = tracking.MlflowClient(tracking_uri=place)
    (found,) = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert (found.info.run_name, found.info.status) == ("counting", "FINISHED")
    assert found.data.params == {"model": "miniature", "experts.steps": "3", "experts.optimizer": "adamw"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((each.step, each.value) for each in history) == [(1, 3.0), (2, 2.0), (2, 9.0), (3, 1.0)]
    names = [each.path for each in client.list_artifacts(found.info.run_id, "images")]
    assert sum(name.endswith(".png") for name in names) == 2
    assert client.list_artifacts(found.info.run_id)[0].path == "captions-000003.json"
    assert_no_secret(tmp_path, capfd)


def test_trackio(run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: it asks for an older pillow")
    from trackio.sqlite_storage import SQLiteStorage

    track("trackio", run)
    (name,) = SQLiteStorage.get_runs(PROJECT)
    assert name == "run/counting-0a1b2c3d"
    rows = SQLiteStorage.get_logs(PROJECT, name)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0)
    ]  # fmt: skip
    (samples,) = [row for row in rows if "samples/0" in row]
    assert [samples[f"samples/{number}"]["caption"] for number in range(2)] == list(SAMPLES)
    assert len(list((tmp_path / "trackio/media").rglob("*.png"))) == 2
    assert_no_secret(tmp_path, capfd)


def test_what_could_not_be_logged_to_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = {"wandb", "mlflow", "trackio", "sqlalchemy"}
    monkeypatch.setattr("selma_ray.tracking.opening.find_spec", lambda name: name in there or None)
    local, remote = RunFolder(str(tmp_path)), RunFolder(str(tmp_path))
    monkeypatch.setattr(remote, "uri", "s3://bucket/run")
    monkeypatch.setattr(remote, "is_local", False)
    check_trackers(["tensorboard", "wandb", "mlflow", "trackio"], local)
    with pytest.raises(ConfigError, match="trackers mlflow needs MLFLOW_TRACKING_URI with s3://bucket/run"):
        check_trackers(["mlflow"], remote)
    monkeypatch.delenv("WANDB_MODE")
    check_trackers(["wandb"], remote)
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(
        ConfigError, match="wandb needs WANDB_API_KEY in the environment of every node, or WANDB_MODE=offline"
    ):
        check_trackers(["wandb"], local)
    there.clear()
    check_trackers(["tensorboard"], local)
    with pytest.raises(ConfigError, match="trackers trackio needs its client; `pip install trackio`"):
        check_trackers(["trackio"], local)
