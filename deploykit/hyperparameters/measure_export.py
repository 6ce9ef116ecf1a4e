"""Measure the export of a run, for limits on its size and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from deploykit.data.reading import Reading
from deploykit.data.sample import evenly
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.find_graphs import find_graphs
from deploykit.stages.export import export
from deploykit.tasks.opening import open_graph
from deploykit.tasks.registry import task_of

_ROWS = 50


def measure_export(run: Path, out: Path, say: Callable[[str], None]) -> tuple[float, float]:
    """Export the run to INT8 at ``out``. Returns the size of the graph that ``--engine auto`` opens (units of 1e6 bytes)
    and the median latency of one validation row (ms).

    Raises ExportError if INT8 loses too much.
    """
    manifest = export(run, out, ExportOptions(int8=True), say=say).manifest
    graphs = find_graphs(out, manifest, engine="auto", precision="auto")
    predictor = open_graph(out, manifest)
    try:
        task = task_of(manifest.task)
        kept = str(run / "splits" / "validation.jsonl")
        rows = task.read_texts(kept, manifest.task, reading=Reading(), columns={})
        texts = evenly([text for text, _ in rows], _ROWS)
        task.answer(predictor, texts[:1])
        times = []
        for text in texts:
            start = time.perf_counter()
            task.answer(predictor, [text])
            times.append(1e3 * (time.perf_counter() - start))
    finally:
        predictor.close()
    size = sum(manifest.files[name].bytes for name in graphs.files)
    return size / 1e6, statistics.median(times)
