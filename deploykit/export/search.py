"""Which layers stay in fp32 so that INT8 costs the task no more than a limit: found by measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.errors import ExportError
from deploykit.export.tables import render

_MOST_KEPT = 0.5  # with fewer layers than that in INT8, it is no INT8 model


@dataclass(frozen=True)
class Trial:
    """One assignment that was measured: how many parts stayed in fp32, and the points that it lost."""

    kept: int
    drop: float


@dataclass(frozen=True)
class Search:
    """``kept`` parts stay in fp32, of ``order`` (most sensitive first); ``trials`` in the order they were made."""

    kept: tuple[str, ...]
    order: tuple[str, ...]
    trials: tuple[Trial, ...]


def too_lossy(
    loss: str, limit: float, table: Sequence[Any], why: ExportError, remedy: str = "more --calibration-rows"
) -> ExportError:
    """The export's refusal, with the lines of ``table`` as they were when all was INT8. ``why``: what the search raised;
    ``remedy``: what else may help with this model."""
    return ExportError(
        f"{loss}, more than --max-drop {limit}; {why.message}:\n"
        + "\n".join("  " + text for text in render([asdict(line) for line in table])),
        f"try another --method, {remedy}, or export without --int8; nothing was written",
    )


def fewest_in_fp32(
    order: Sequence[str], drop: Callable[[Sequence[str]], float], limit: float, *, say: Callable[[str], None]
) -> Search:
    """The shortest beginning of ``order`` that, left in fp32, keeps ``drop`` within ``limit``; by doubling, then bisection.

    Args:
        order: parts of the model, the most sensitive first.
        drop: writes the graph with some parts in fp32, and measures the points that it loses.

    The last graph written is that of the result. Raises ExportError when even half of the parts in
    fp32 do not hold the limit; the graph of that attempt is then the last.
    """
    trials: dict[int, float] = {}

    def holds(count: int) -> bool:
        if count not in trials:
            trials[count] = drop(order[:count])
            say(f"with {count} of {len(order)} parts in fp32 it loses {trials[count]:.2f} points")
        return trials[count] <= limit

    most = int(len(order) * _MOST_KEPT)
    too_few, enough = 0, 1
    while not holds(min(enough, most)):
        if enough >= most:
            raise ExportError(
                f"INT8 loses {trials[most]:.2f} points, more than {limit}, even with {most} of {len(order)} parts in fp32",
                "try another --method or more --calibration-rows",
            )
        too_few, enough = enough, 2 * enough
    enough = min(enough, most)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if holds(middle) else (middle, enough)
    if list(trials)[-1] != enough:
        drop(order[:enough])
    return Search(tuple(order[:enough]), tuple(order), tuple(Trial(*trial) for trial in trials.items()))
