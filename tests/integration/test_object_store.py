"""A run's folder on a server that speaks S3, on loopback."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from selma_ray.errors import StorageError
from selma_ray.images.shards import existing_ids, forget_failures, read_images, write_shards
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.images.test_crashes import ids as rendered_ids
from tests.unit.images.test_crashes import run as render_all
from tests.unit.images.test_shards import row, table

BUCKET = "selma"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def folder(server: Any, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    from pyarrow import fs

    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    filesystem, _ = fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")
    filesystem.create_dir(BUCKET)
    return RunFolder(f"s3://{BUCKET}/run")


def test_objects_tables_and_markers_come_back_and_go(folder: RunFolder) -> None:
    folder.write_json({"a": 1}, "x", "y.json")
    folder.write_table(pa.table({"id": ["1"]}), "t", "a.parquet")
    folder.mark_done("train", {"loss": 1.5})
    assert folder.read_json("x", "y.json") == {"a": 1}
    assert folder.read_table(folder.files("t"), columns=["id"])["id"].to_pylist() == ["1"]
    assert folder.done("train") == {"loss": 1.5}
    assert folder.done("merge") is None
    assert folder.files(suffix=".parquet") == ["t/a.parquet"]
    assert folder.path("t", "a.parquet") == f"s3://{BUCKET}/run/t/a.parquet"
    folder.write_bytes(b"x" * 7_000_000, "large")  # more than one part of an upload
    assert len(folder.read_bytes("large")) == 7_000_000
    for name in ("t", "x", "large", "nothing"):
        folder.delete(name)
    assert folder.files() == ["done/train.json"]


def test_images_are_written_read_and_forgotten(folder: RunFolder) -> None:
    write_shards(folder, table(row("a"), row("b", error="ValueError: no")))
    assert existing_ids(folder) == {"a"}
    assert len(folder.files("failures")) == 1
    forget_failures(folder)
    assert folder.files("failures") == []
    assert read_images(folder, "one")["id"].to_pylist() == ["a"]


def test_an_endpoint_may_stand_in_the_address(server: Any, monkeypatch: pytest.MonkeyPatch, folder: RunFolder) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host, port = server.get_host_and_port()
    named = RunFolder(f"s3://{BUCKET}/named?scheme=http&endpoint_override={host}:{port}")
    named.write_bytes(b"x", "a", "b")
    assert named.files() == ["a/b"]
    assert RunFolder(named.path("a")).read_bytes("b") == b"x"


def test_a_bucket_that_is_not_there_and_a_server_that_does_not_answer_are_one_line(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"s3://nowhere/run/a cannot be written: .*run the same command again"):
        RunFolder("s3://nowhere/run").write_bytes(b"x", "a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    lost = RunFolder(f"s3://{BUCKET}/run")
    for touch in (lambda: lost.write_bytes(b"x", "a"), lambda: lost.exists("a")):  # each gives up after seconds
        with pytest.raises(StorageError) as caught:
            touch()
        assert len(str(caught.value).splitlines()) == 1


class CutFolder(RunFolder):
    """Loses its server at a write."""

    def __init__(self, uri: str, cut_at: int, cut: Any) -> None:
        super().__init__(uri)
        self._left = cut_at
        self._cut = cut

    def write_bytes(self, content: Any, *parts: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._cut()
        super().write_bytes(content, *parts)


def test_rendering_that_loses_its_server_stops_and_resumes(
    folder: RunFolder, server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    undisturbed = RunFolder(str(tmp_path))
    render_all(undisturbed, model)

    def cut() -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        cut_off._filesystem = RunFolder(cut_off.uri)._filesystem

    cut_off = CutFolder(f"s3://{BUCKET}/cut", cut_at=5, cut=cut)
    with pytest.raises(StorageError, match=r"s3://selma/cut/.* cannot be written: .*run the same command again"):
        render_all(cut_off, model)

    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    again = RunFolder(cut_off.uri)
    before = existing_ids(again)
    assert 0 < len(before) < len(existing_ids(undisturbed))
    assert render_all(again, model) <= 4  # a batch
    assert rendered_ids(again) == rendered_ids(undisturbed)
    assert before <= existing_ids(again)
