"""The last step of the stream: rendered rows become shards of the run's folder."""

import pyarrow as pa

from selma_ray.images.compaction import ShardCompactor
from selma_ray.images.in_flight import finish_batches
from selma_ray.images.shards import write_candidates, write_shards
from selma_ray.storage import RunFolder

__all__ = ["WriteImages"]


class WriteImages:
    """Writes rendered rows and passes on what progress needs of them; `unjudged` ones are kept apart until a judge has chosen."""

    def __init__(self, folder: RunFolder, unjudged: bool = False) -> None:
        self._folder = folder
        self._unjudged = unjudged
        self._compactor = ShardCompactor(folder)

    def __call__(self, rendered: pa.Table) -> pa.Table:
        """Write rows of RENDERED_SCHEMA; returns a light row for each."""
        if self._unjudged:
            write_candidates(self._folder, rendered)
        else:
            self._compactor.add(write_shards(self._folder, rendered))
        finish_batches(self._folder, rendered["batch"].unique().to_pylist())
        return rendered.select(["id", "skill", "prompt", "split", "error", "seconds", "again", "score"])
