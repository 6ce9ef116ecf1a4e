"""Find by measurement the layers that must stay in fp32 to keep the loss of INT8 within a limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import ExportError
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.grading import BROKEN, Grader, Line, Loss
from deploykit.quantization.tables import render

SAMPLE = 64
"""Number of rows to measure a part's sensitivity on."""
_MOST_KEPT = 0.5  # largest share of parts in fp32: above it the model is hardly INT8


@dataclass(frozen=True)
class Trial:
    """One measured trial: the number of parts in fp32, the points lost, the metrics, and the measure that found the points."""

    kept: int
    drop: float
    metrics: Mapping[str, float]
    measure: str


@dataclass(frozen=True)
class Search:
    """Result of a search.

    The first parts of ``order`` stay in fp32 (``kept``). ``sensitivity`` is, in that order, how much the model's
    outputs change when that part alone, or it and those sampled with it, are INT8. ``trials`` are in the order they were made.
    """

    kept: tuple[str, ...]
    order: tuple[str, ...]
    sensitivity: tuple[float, ...]
    trials: tuple[Trial, ...]


def hold_limit(
    name: str,
    parts: Sequence[str],
    write: Callable[[Sequence[str]], Line],
    sample: Callable[[Collection[str]], NDArray[Any]],
    grader: Grader[Any],
    limit: float,
    trace: MeasurementLog,
    say: Callable[[str], None],
    remedy: str = "another --method, more --calibration-rows",
    instead: str = "fp32",
    improve: Callable[[str], bool] = lambda loss: False,
    most_samples: int = 1000,
) -> Search | None:
    """Quantize all ``parts`` of a model or, if that loses more than ``limit`` points, all but the most sensitive ones.

    Args:
        name: the model's form, for messages and the trace.
        write: writes the graph with some parts left in fp32, and grades it.
        sample: outputs for some rows when only these parts are INT8. It may overwrite the graph.
        remedy: the error's suggestion.
        instead: the precision of the parts that are left.
        improve: takes a text about the loss, and improves the rounding of ``write`` if possible; tried before any part is left out.
        most_samples: if there are more parts, neighbours are sampled together, and have the same sensitivity.

    The last graph written is the result. Returns None if all parts are INT8. Raises ExportError with the measured table
    if half of the parts in fp32 do not hold the limit.
    """

    def quantize_all() -> tuple[Line, Loss]:
        line = write(())
        return line, grader.judge(line, name, limit, say)

    whole, lost = quantize_all()
    if lost.points > limit and improve(f"{name} loses {lost}"):
        whole, lost = quantize_all()
    if lost.points <= limit:
        return None
    table = grader.table
    loss = f"{name} loses {lost}"
    count = min(len(parts), most_samples)
    groups = [parts[len(parts) * i // count : len(parts) * (i + 1) // count] for i in range(count)]
    say(f"{loss}: measuring which of its {len(parts)} parts need {instead}")
    expected = sample(())

    def change(group: Sequence[str]) -> float:
        return float(np.nan_to_num(np.abs(sample(group) - expected).mean(), nan=BROKEN, posinf=BROKEN))

    sensitivity: dict[str, float] = {}
    for i, group in enumerate(groups, 1):
        name_of_group = group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}"
        found = trace.measured(f"{name}: {name_of_group} alone", partial(change, group))
        say(f"{i} of {count}: {name_of_group} alone in {whole.precision.upper()} changes the outputs by {found:.2g}")
        sensitivity |= dict.fromkeys(group, found)
    order = sorted(parts, key=lambda part: -sensitivity[part])
    trials = [Trial(0, lost.points, whole.judged, lost.measure)]
    written: list[Sequence[str]] = []

    def measure(kept: Sequence[str]) -> dict[str, Any]:
        written.append(kept)
        line = write(kept)
        found = grader.loss(line, limit)
        return {"drop": found.points, "metrics": line.judged, "measure": found.measure}

    def trial(kept: Sequence[str]) -> float:
        trials.append(Trial(len(kept), **trace.measured(f"{name}: loss with {len(kept)} kept", partial(measure, kept))))
        say(
            f"with {len(kept)} of {len(order)} parts in {instead} it loses {trials[-1].drop:.2f} points of {trials[-1].measure}"
        )
        return trials[-1].drop

    try:
        kept = fewest(order, trial, limit, instead)
    except ExportError as error:
        trace.remove()
        raise ExportError(
            f"{loss}, more than --max-drop {limit}; {error.message}:\n"
            + "\n".join("  " + text for text in render([line.to_json() for line in table])),
            f"try {remedy}, or export without --{whole.precision}; nothing was written",
        ) from error
    if not written or written[-1] != kept:
        write(kept)
    return Search(tuple(kept), tuple(order), tuple(sensitivity[part] for part in order), tuple(trials))


def fewest(
    order: Sequence[str], drop: Callable[[Sequence[str]], float], limit: float, instead: str = "fp32"
) -> Sequence[str]:
    """Return the shortest beginning of ``order`` that, left in a higher precision (``instead``), keeps ``drop`` within ``limit``.

    It doubles the length, then bisects. Raises ExportError if half of ``order`` is not enough.
    """
    drops: dict[int, float] = {}

    def holds(count: int) -> bool:
        if count not in drops:
            drops[count] = drop(order[:count])
        return drops[count] <= limit

    most = int(len(order) * _MOST_KEPT)
    too_few, enough = 0, 1
    while not holds(min(enough, most)):
        if enough >= most:
            raise ExportError(f"even with {most} of {len(order)} parts in {instead} it loses {drops[most]:.2f}")
        too_few, enough = enough, 2 * enough
    enough = min(enough, most)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if holds(middle) else (middle, enough)
    return order[:enough]
