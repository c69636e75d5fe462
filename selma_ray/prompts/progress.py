"""How far the prompts have come: written into the run's folder as answers are decided, for whoever wants to know.

progress/prompts.json   written every few seconds: kept and rejected prompts of all starts, the rate of the latest
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from selma_ray.storage import RunFolder

__all__ = ["PromptProgress", "read_prompt_progress", "watch_prompts", "write_prompt_progress"]

_PATH = ("progress", "prompts.json")
_READ_EVERY_S = 2.0


@dataclass(frozen=True)
class PromptProgress:
    """Counts are prompts; times are seconds since the epoch."""

    wanted: int
    """Prompts that the run is to keep."""
    kept: int = 0
    """Prompts kept so far."""
    found: int = 0
    """Prompts that earlier starts had kept."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why candidates were rejected, each with its count, the commonest first."""
    first_answer_at: float = 0.0
    """When the first answer of this start was decided."""
    updated_at: float = 0.0
    """When this was written."""

    @property
    def prompts_per_s(self) -> float | None:
        """Return the rate since the first answer of this start; None before the second."""
        elapsed_s = self.updated_at - self.first_answer_at
        return (self.kept - self.found) / elapsed_s if elapsed_s > 0 else None

    @property
    def words(self) -> str:
        """Return all of it in one line."""
        rate = "" if self.prompts_per_s is None else f" at {self.prompts_per_s:.3g}/s"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        rejected = f"{sum(self.reasons.values())} rejected" + (f" ({reasons})" if reasons else "")
        return f"prompts: {self.kept} of {self.wanted} kept{rate}, {rejected}"


def write_prompt_progress(folder: RunFolder, progress: PromptProgress) -> None:
    """Write the progress, in place of what was written before."""
    folder.write_json(asdict(progress), *_PATH)


def read_prompt_progress(folder: RunFolder) -> PromptProgress | None:
    """Return what was written last, or None where nothing was."""
    return PromptProgress(**folder.read_json(*_PATH)) if folder.exists(*_PATH) else None


def watch_prompts(folder: RunFolder) -> Callable[[], str | None]:
    """Return a function that may be called at any rate and returns the progress in words, None before there is any."""
    words: str | None = None
    read_s = float("-inf")

    def latest() -> str | None:
        nonlocal words, read_s
        if time.monotonic() - read_s >= _READ_EVERY_S:
            read_s = time.monotonic()
            progress = read_prompt_progress(folder)
            words = progress.words if progress else None
        return words

    return latest
