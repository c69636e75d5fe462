"""A run's folder on a server that speaks S3, on loopback."""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError, StorageError
from selma_ray.images.shards import existing_ids, forget_failures, read_images, write_shards
from selma_ray.local_copies import local_copy, upload_folder, whole_folder
from selma_ray.models.config import ModelConfig
from selma_ray.run.lease import held
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder
from selma_ray.study.arms import arm_recipe, reuse
from selma_ray.study.config import StudyConfig
from selma_ray.study.study import Study
from tests.object_store import BUCKET, Outage, object_store
from tests.unit.images.test_crashes import ids as rendered_ids
from tests.unit.images.test_crashes import run as render_all
from tests.unit.images.test_shards import row, table


@pytest.fixture(scope="module")
def server() -> Iterator[Mapping[str, str]]:
    with object_store() as environment:
        yield environment


@pytest.fixture
def folder(server: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    return folder_on(server, monkeypatch)


def folder_on(server: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Return a run's folder in a bucket of its own."""
    from pyarrow import fs

    for name, value in server.items():
        monkeypatch.setenv(name, value)
    filesystem, _ = fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")
    filesystem.create_dir(BUCKET)
    return RunFolder(f"s3://{BUCKET}/run")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELMA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def test_an_endpoint_may_stand_in_the_address(
    server: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, folder: RunFolder
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    address = server["AWS_ENDPOINT_URL"].removeprefix("http://")
    named = RunFolder(f"s3://{BUCKET}/named?scheme=http&endpoint_override={address}")
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


@contextmanager
def of_a_driver(folder: RunFolder) -> Iterator[RunFolder]:
    with held(folder):
        yield folder


@contextmanager
def of_a_worker(folder: RunFolder) -> Iterator[RunFolder]:
    yield pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(folder))))


@pytest.mark.parametrize(("of", "late_s", "outage_s"), [(of_a_driver, 0, 8), (of_a_worker, 0, 3), (of_a_worker, 4, 12)])
def test_a_store_that_answers_503_or_late_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    of: Callable[[RunFolder], AbstractContextManager[RunFolder]],
    late_s: float,
    outage_s: float,
) -> None:
    outage = Outage(late_s)
    with object_store(outage) as server, of(folder_on(server, monkeypatch)) as folder:
        outage.begin(outage_s)  # longer than pyarrow waits by itself
        folder.write_bytes(b"x", "a")
        assert folder.read_bytes("a") == b"x"
    assert outage.met > 1


def test_a_folder_appears_when_its_last_file_does_and_replaces_what_was_there(folder: RunFolder) -> None:
    for version in (1, 2):
        with whole_folder(folder, "merged", "m", last="report.json") as part:
            (part / "adapter").mkdir()
            (part / "adapter" / f"{version}.bin").write_bytes(b"x" * version)
            (part / "report.json").write_text(str(version))
    assert folder.files("merged") == ["merged/m/adapter/2.bin", "merged/m/report.json"]
    with pytest.raises(ZeroDivisionError), whole_folder(folder, "merged", "m", last="report.json") as part:
        (part / "report.json").write_text(str(1 / 0))
    assert folder.read_bytes("merged", "m", "report.json") == b"2"

    with pytest.raises(StorageError):
        _write_version_3(Deaf(folder.uri, "adapter"))
    assert not folder.exists("merged", "m", "report.json")


def _write_version_3(folder: RunFolder) -> None:
    with whole_folder(folder, "merged", "m", last="report.json") as part:
        (part / "adapter").write_bytes(b"x")
        (part / "report.json").write_text("3")


class Deaf(RunFolder):
    """Cannot be written where a name stands in the path."""

    def __init__(self, uri: str, name: str) -> None:
        super().__init__(uri)
        self._name = name

    def upload(self, source: Path, *parts: str) -> None:
        if self._name in parts:
            raise StorageError("no answer")
        super().upload(source, *parts)


def test_a_node_reads_through_copies_of_its_own(
    folder: RunFolder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_bytes(b"one", "experts", "a", "weights")
    folder.write_bytes(b"log", "experts", "a", "tensorboard", "events")
    copy = local_copy(folder.path("experts", "a"), only=["weights", "config"])
    assert (copy.name, [path.name for path in copy.rglob("*")]) == ("a", ["weights"])
    (copy / "weights").write_bytes(b"eno")  # a second reading does not fetch it again
    assert local_copy(folder.path("experts", "a"), only=["weights"]).joinpath("weights").read_bytes() == b"eno"
    assert local_copy(folder.path("experts", "a", "weights")).read_bytes() == b"one"
    folder.write_bytes(b"three", "experts", "a", "weights")
    assert local_copy(folder.path("experts", "a", "weights")).read_bytes() == b"three"
    assert local_copy(cache) == cache
    with pytest.raises(StorageError, match=r"s3://selma/run/experts/b must hold weights, nothing is there"):
        local_copy(folder.path("experts", "b"), only=["weights"])


def test_the_copies_of_a_node_are_bounded(folder: RunFolder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELMA_CACHE_GB", "2.5e-6")  # two of a thousand bytes
    for number in range(4):
        folder.write_bytes(b"x" * 1000, "objects", str(number))
    copies = [local_copy(folder.path("objects", str(number))) for number in range(3)]
    assert all(copy.exists() for copy in copies)  # each may be being read
    for copy in copies[:2]:
        os.utime(copy.parent, (time.time() - 7200,) * 2)
    local_copy(folder.path("objects", "1"))
    copies.append(local_copy(folder.path("objects", "3")))
    assert [copy.exists() for copy in copies] == [False, True, True, True]
    monkeypatch.setenv("SELMA_CACHE_GB", "much")
    folder.write_bytes(b"x", "objects", "4")
    with pytest.raises(ConfigError, match="SELMA_CACHE_GB must be a number above 0, got 'much'"):
        local_copy(folder.path("objects", "4"))


def test_a_model_and_an_adapter_are_loaded_from_the_store(
    folder: RunFolder, cache: Path, tiny_pipeline_dir: Path
) -> None:
    from selma_ray.models.identity import model_identity
    from selma_ray.models.rendering import load_pipeline

    upload_folder(tiny_pipeline_dir, folder, "model")
    stored, local = ModelConfig(name=folder.path("model")), ModelConfig(name=str(tiny_pipeline_dir))
    assert model_identity(stored) == model_identity(local)
    assert load_pipeline(stored, "cpu").unet.config.sample_size == load_pipeline(local, "cpu").unet.config.sample_size


def test_files_are_copied_between_any_two_folders(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_bytes(b"x", "images", "a", "b.parquet")
    for target in (RunFolder(str(tmp_path / "run")), RunFolder(folder.path("other"))):
        folder.copy_files(target, ["images/a/b.parquet"])
        assert target.files() == ["images/a/b.parquet"]


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
    folder: RunFolder,
    server: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_pipeline_dir: Path,
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

    monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
    again = RunFolder(cut_off.uri)
    before = existing_ids(again)
    assert 0 < len(before) < len(existing_ids(undisturbed))
    assert render_all(again, model) <= 4  # a batch
    assert rendered_ids(again) == rendered_ids(undisturbed)
    assert before <= existing_ids(again)


def test_a_study_s_experiments_share_what_one_of_them_has_made(folder: RunFolder) -> None:
    arms = {
        "selma": {"title": "SELMA"},
        "factors": {"title": "factors", "changes": {"merging.method": "average_factors"}},
    }
    recipe = {"run_dir": folder.uri, "skills": ["miniature/common"], "model": {"name": "miniature"}}
    llm = {
        "prompts": {"llm": {"name": "miniature", "engine": "free", "chat": False}},
        "evaluation": {"suite": "miniature"},
    }
    study = Study(
        validate(StudyConfig, {"recipe": "recipe.yaml", "arms": arms}, "test"), validate(Recipe, recipe | llm, "test")
    )
    first, second = (open_run(arm_recipe(study, name, 0)) for name in arms)
    made = {f"{part}/common/{number}" for part in ("prompts", "images", "cache", "experts") for number in range(3)}
    for path in made:
        first.folder.write_bytes(path.encode(), path)
    for stage in ("generate", "train"):
        first.folder.mark_done(stage, {"made": stage})
    # An earlier start was killed while it copied the images.
    second.folder.write_bytes(b"", "sharing", "images")
    second.folder.write_bytes(b"half", "images/common/0")
    reuse(second, [first])
    assert {path: second.folder.read_bytes(path) for path in made} == {path: path.encode() for path in made}
    assert [second.folder.done(stage) for stage in ("generate", "train")] == [{"made": "generate"}, {"made": "train"}]
    assert not second.folder.files("sharing")
