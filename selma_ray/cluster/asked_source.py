"""A Ray Data source whose blocks are asked of an actor, one by one, as they come to be: what a stream goes on with depends on its end."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

__all__ = ["AskedSource"]


class AskedSource(Datasource):
    """Asks a method of an actor for the rows of block 0, 1, …; it waits until there are some, and gives none when no more will come.

    One task is one block, because the blocks of one task are merged up to Ray's block size before they flow on. Tasks that are left
    over come back empty. A call may be repeated, as Ray repeats the tasks of a lost worker.
    """

    def __init__(self, ask: Any, schema: pa.Schema, num_blocks: int) -> None:
        super().__init__()
        self._ask = ask
        self._schema = schema
        self._num_blocks = num_blocks

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: blocks are not known before they are asked for."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return a read task per block."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(
                _BlockReader(self._ask, self._schema, position),
                metadata,
                schema=self._schema,
                per_task_row_limit=per_task_row_limit,
            )
            for position in range(self._num_blocks)
        ]


class _BlockReader:
    def __init__(self, ask: Any, schema: pa.Schema, position: int) -> None:
        self._ask = ask
        self._schema = schema
        self._position = position

    def __call__(self) -> Iterable[pa.Table]:
        return [pa.Table.from_pylist(ray.get(self._ask.remote(self._position)), schema=self._schema)]
