import errno
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from selma_ray.errors import StorageError
from selma_ray.storage import RunFolder


def test_objects_and_tables_come_back(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_json({"a": [1, "ü"]}, "x", "y.json")
    folder.write_table(pa.table({"id": ["1", "2"]}), "t", "a.parquet")
    folder.write_table(pa.table({"id": ["3"]}), "t", "b.parquet")
    assert folder.read_json("x", "y.json") == {"a": [1, "ü"]}
    assert folder.files("t", suffix=".parquet") == ["t/a.parquet", "t/b.parquet"]
    assert folder.read_table(folder.files("t"), columns=["id"])["id"].to_pylist() == ["1", "2", "3"]


def test_a_folder_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path)).files("nowhere") == []


def test_it_travels_to_other_processes(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(RunFolder(str(tmp_path))))
    folder.write_bytes(b"x", "a")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_failed_write_leaves_the_old_object_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_bytes(b"old", "a")

    def full(self: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="no space left to write"):
        folder.write_bytes(b"new", "a")
    assert folder.read_bytes("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "a.json.123.part").write_text("{")
    assert RunFolder(str(tmp_path)).files() == []


def test_what_a_killed_writer_left_can_be_deleted(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_bytes(b"x", "a", "b", "c")
    (tmp_path / "a" / "b" / "d.123.part").write_text("{")
    folder.delete_partial("a")
    folder.delete_partial("nowhere")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["c"]


def test_done_markers_hold_their_summary(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert folder.done("train") is None
    folder.mark_done("train", {"loss": 1.5})
    assert folder.done("train") == {"loss": 1.5}


def test_unknown_storage_and_unreadable_objects_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="use a path"):
        RunFolder("ftp7://x/y")
    folder = RunFolder(str(tmp_path))
    folder.write_bytes(b"{", "a.json")
    with pytest.raises(StorageError, match="must be JSON"):
        folder.read_json("a.json")
    with pytest.raises(StorageError, match="cannot be read"):
        folder.read_bytes("missing")
