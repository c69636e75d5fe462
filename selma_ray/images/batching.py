"""Full batches from what several callers want rendered: a task's rows rarely come in multiples of a batch."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

__all__ = ["SharedBatches"]

# The rows of a batch just rendered are on their way out, and the next of that caller come when they are.
_WAIT_TO_FILL_S = 0.05

Row = TypeVar("Row")
Rendered = TypeVar("Rendered")


class SharedBatches(Generic[Row, Rendered]):
    """Calls `render` in one thread of its own with at most `batch_size` rows, whoever handed them in.

    Rows of one `kind` share a batch: that of the first row, or one of which there is a full batch. They are taken in the order in which
    they came; a batch is short only where no more rows of its kind come within a moment.
    """

    def __init__(
        self,
        render: Callable[[Sequence[Row]], Sequence[Rendered]],
        batch_size: int,
        kind: Callable[[Row], Hashable] = lambda row: None,
    ) -> None:
        self._render = render
        self._batch_size = batch_size
        self._kind = kind
        self._thread = ThreadPoolExecutor(1, "denoiser")
        self._arrived = threading.Condition()
        self._waiting: deque[tuple[Row, Future[tuple[Rendered, float]]]] = deque()

    def render(self, rows: Sequence[Row]) -> list[tuple[Rendered, float]]:
        """Return each row's result and its share of its batch's seconds; may be called from several threads."""
        results: list[Future[tuple[Rendered, float]]] = [Future() for _ in rows]
        with self._arrived:
            self._waiting.extend(zip(rows, results, strict=True))
            self._arrived.notify_all()
        # As many calls as these rows alone would need: so there are always enough for all rows that wait.
        for count in Counter(map(self._kind, rows)).values():
            for _ in range(0, count, self._batch_size):
                self._thread.submit(self._render_next)
        return [result.result() for result in results]

    def alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the thread, while no batch is rendered, and return what it returns."""
        return self._thread.submit(function, *arguments).result()

    def _render_next(self) -> None:
        with self._arrived:
            self._arrived.wait_for(
                lambda: self._most_waiting() >= self._batch_size, _WAIT_TO_FILL_S if self._waiting else 0
            )
            batch = self._take()
        if not batch:
            return
        started_s = time.monotonic()
        try:
            rendered = self._render([row for row, _ in batch])
        except BaseException as error:
            for _, result in batch:
                result.set_exception(error)
            return
        seconds = (time.monotonic() - started_s) / len(batch)
        for (_, result), each in zip(batch, rendered, strict=True):
            result.set_result((each, seconds))

    def _most_waiting(self) -> int:
        return max(Counter(self._kind(row) for row, _ in self._waiting).values(), default=0)

    def _take(self) -> list[tuple[Row, Future[tuple[Rendered, float]]]]:
        """Take the rows of the next batch out of those that wait."""
        if not self._waiting:
            return []
        counts = Counter(self._kind(row) for row, _ in self._waiting)  # in the order of each kind's first row
        full = (kind for kind, count in counts.items() if count >= self._batch_size)
        taken = next(full, self._kind(self._waiting[0][0]))
        of_kind = [item for item in self._waiting if self._kind(item[0]) == taken][: self._batch_size]
        chosen = {id(item) for item in of_kind}
        self._waiting = deque(item for item in self._waiting if id(item) not in chosen)
        return of_kind
