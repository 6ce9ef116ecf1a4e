"""Measure a candidate in a separate process: time to first answer, and memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.bench.load import answer_texts
from deploykit.peak_memory import PeakMemory
from deploykit.runtime.generation import Generation
from deploykit.tasks.protocol import Predictor

_TEXTS = 256
_BATCH = 64
_ANSWERED = "deploykit: the first text is answered"


@dataclass(frozen=True)
class ProcessMeasurement:
    """A measurement. ``first_answer_s`` counts from the start of Python, with files in the page cache; memory is in 1e6
    bytes."""

    peak_memory_mb: float
    first_answer_s: float


def measure_alone(words: Sequence[str], job: Mapping[str, Any], texts: Sequence[str]) -> ProcessMeasurement | None:
    """Run Python with the arguments ``words``, whose program calls ``answer_alone``. Returns None if that fails.

    The program gets ``job`` (plain JSON) and answers up to 256 of ``texts``: first one, then 64 at a time.
    """
    first = None
    last = ""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            json.dump({**job, "texts": list(texts[:_TEXTS])}, child.stdin)
        for line in child.stdout:
            if line.strip() == _ANSWERED:
                first = time.perf_counter() - started
            last = line
    return ProcessMeasurement(float(last), first) if child.returncode == 0 and first is not None else None


def answer_alone(open_job: Callable[[Mapping[str, Any]], tuple[Predictor, Generation | None]]) -> None:
    """Open the model that the job describes, answer its texts, and report the peak memory, for ``measure_alone``."""
    job = json.load(sys.stdin)
    texts = job.pop("texts")
    with PeakMemory(None) as memory:
        predictor, generation = open_job(job)
        answer_texts(predictor, texts[:1], generation)
        print(_ANSWERED, flush=True)
        for start in range(0, len(texts), _BATCH):
            answer_texts(predictor, texts[start : start + _BATCH], generation)
    print(memory.peak_mb)
