"""How far a stage has come, on the console: a bar with the time left on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from selma_ray.progress import Progress, Report

__all__ = ["progress_display"]

_LINE_EVERY_S = 10.0
_DETAIL_CHARS = 80


@contextmanager
def progress_display(console: Console) -> Iterator[Report]:
    """Yield a report function that draws a bar on a terminal and prints a line now and then elsewhere."""
    if not console.is_terminal:
        yield _line_reporter(console)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with _BarsAndFigures(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None, detail="starting")

        def report(progress: Progress) -> None:
            bars.figures = progress.figures
            bars.update(task, completed=progress.done, total=progress.total, detail=progress.detail[:_DETAIL_CHARS])

        yield report


class _BarsAndFigures(Bars):
    """Bars with lines of figures below them."""

    figures: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is drawn, from top to bottom."""
        yield from super().get_renderables()
        yield from map(Text, self.figures)


def _line_reporter(console: Console) -> Report:
    last_s, last = time.monotonic(), ""

    def report(progress: Progress) -> None:
        nonlocal last_s, last
        if time.monotonic() - last_s >= _LINE_EVERY_S or progress.done == progress.total:
            parts = f"{progress.done}/{progress.total}", *progress.figures, progress.detail[:_DETAIL_CHARS]
            line = f"  {progress.stage} {'; '.join(filter(None, parts))}"
            if line != last:  # what stands still for minutes is said once
                console.print(line, markup=False)
            last_s, last = time.monotonic(), line

    return report
