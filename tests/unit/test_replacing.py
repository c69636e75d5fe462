import threading
from pathlib import Path
from typing import Any

import pytest

from selma_ray import replacing
from selma_ray.replacing import replace_folder


def write(folder: Any, text: Any) -> Any:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def test_a_folder_takes_an_empty_place(tmp_path: Path) -> None:
    replace_folder(write(tmp_path / "new.part", "new"), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(replacing, "_exchanged", lambda one, other: False)
    write(tmp_path / "merged", "old")
    replace_folder(write(tmp_path / "new.part", "new"), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert (tmp_path / "merged" / "file").read_text() == "new"


def test_a_reader_never_misses_the_folder(tmp_path: Path) -> None:
    target = write(tmp_path / "merged", "0")
    if not replacing._exchanged(write(tmp_path / "one", "0"), write(tmp_path / "other", "0")):
        pytest.skip("this filesystem cannot exchange two folders")
    missed, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                (target / "file").read_text()
            except OSError as error:
                missed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        replace_folder(write(tmp_path / "new.part", str(number)), target)
    stop.set()
    reader.join()
    assert not missed
    assert (target / "file").read_text() == "299"
