"""The question whether all nodes see a run's folder, where a node is not what Ray's list says."""

import logging
from pathlib import Path
from typing import Any

import pytest

from selma_ray.cluster import sharing
from selma_ray.cluster.sharing import check_shared
from selma_ray.errors import StorageError
from selma_ray.storage import RunFolder

GONE = {"NodeID": "ab" * 28, "NodeManagerAddress": "192.0.2.7", "Alive": True}


@pytest.fixture
def nodes(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Ray list a node before this one that is gone."""
    import ray

    listed = [GONE, *ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: listed)


@pytest.mark.usefixtures("nodes")
def test_a_node_that_has_left_is_not_asked_and_the_others_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    class Folder(RunFolder):
        def exists(self, *parts: str) -> bool:
            asked.append(parts)
            return super().exists(*parts)

    with caplog.at_level(logging.WARNING):
        check_shared(Folder(str(tmp_path)))
    assert "node 192.0.2.7 has left the cluster" in caplog.text
    assert len(asked) == 1  # the driver looked for what this node wrote
    assert not (tmp_path / "probes").exists()


@pytest.mark.usefixtures("nodes")
def test_a_node_that_neither_answers_nor_leaves_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(sharing, "_TIMEOUT_S", 1.0)

    class Elsewhere(RunFolder):
        """A folder in which nothing that the driver writes ever shows."""

        def write_bytes(self, content: Any, *parts: str) -> None:
            """Write nothing."""

        def __reduce__(self) -> Any:
            return RunFolder, (self.uri,)

    with pytest.raises(
        StorageError, match=r"did not say within 1 s whether it sees run_dir .*run the same command again$"
    ):
        check_shared(Elsewhere(str(tmp_path)))
