"""Compare two Triton servers of the same translation model: one lets requests join the running batch, the other does
not.

There are two models: the demo's translator, and one of opus-mt's shape with the same tokenizer, which must generate as
many tokens for each sentence as its reference has.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.bench.load import measure
from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Poisson, Scenario, Server, Within
from deploykit.runtime.engines import NATIVE_FILE
from deploykit.runtime.generation import override
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.opening import open_predictor
from deploykit.tasks.registry import task_of
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

NAMES = {True: "in-flight batching", False: "batch at a time"}
_CALLERS = 32
_SHARES = (0.5, 0.75)  # of the first server's throughput in a closed loop
LIMITS_MS = {"serving": 50.0, "serving-shape": 200.0}  # by the subject's key in the record
_MOST_TOKENS = 64  # of a sentence and of its reference, for the shape


def measure_serving(
    export: Path,
    folder: Path,
    texts: Sequence[str],
    references: Sequence[str] | None,
    *,
    rates: Sequence[float] | None,
    limit_ms: float | None,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """Return a bench result of both, greedy: Poisson arrivals, optionally the highest rate within a p99 limit, a closed
    loop.

    ``rates`` are per second; by default they are shares of the throughput of in-flight batching with 32 callers.
    ``limit_ms`` is the p99 limit. ``lengths``: the number of tokens that each text's translation must have, with the
    end token.
    """
    warmup_s = min(1.0, seconds)
    servers = []
    for in_flight, name in NAMES.items():
        repository = folder / name.replace(" ", "-")
        package(export, "model", repository, settings=ServingSettings(in_flight=in_flight), stream=False)
        servers.append(TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0))
    with servers[0], servers[1]:
        candidates = [_candidate(name, server.urls.http, lengths) for name, server in zip(NAMES.values(), servers)]
        callers = ClosedLoop(_CALLERS)
        if rates is None:
            first = candidates[0]
            asked = measure(
                first.target, texts, callers, seconds=seconds, generation=first.generation, warmup_s=warmup_s
            )
            most = asked.throughput_per_s
            rates = [round(share * most, 1) for share in _SHARES]
            say(f"{most:.0f} texts/s with {_CALLERS} callers: arrivals at {', '.join(map(str, rates))} a second")
        found: list[Scenario] = [] if limit_ms is None else [Within(limit_ms)]
        scenarios: list[Scenario] = [*map(Poisson, rates), *found, callers]
        return run_bench(
            candidates, texts, references, scenarios, rounds=rounds, seconds=seconds, warmup_s=warmup_s, progress=say
        ).to_json()


def served_shape(shape: Path, task: Translation, example: Path, folder: Path) -> Path:
    """Write an export to ``folder``: weights of ``shape`` for ``native``, tokenizer and languages of ``example``.

    Most generated tokens are unknown to the tokenizer; they are put into the text as unknown tokens.
    """
    manifest = load_manifest(example, "export")
    assert isinstance(manifest.task, Translation)
    folder.mkdir()
    for file in (
        shape / NATIVE_FILE,
        *(example / file for file in task_of(manifest.task).tokenizer_files(list(manifest.files))),
    ):
        shutil.copy(file, folder)
    longest = manifest.task.generation.max_length
    generation = dataclasses.replace(task.generation, min_length=0, max_length=longest)
    task = dataclasses.replace(task, source=manifest.task.source, target=manifest.task.target, generation=generation)
    write_manifest(folder, "export", task, inputs="")
    return folder


def mixed_lengths(export: Path, texts: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return those of ``texts`` with at most 64 tokens whose references have at most 64, and the references'
    lengths."""
    task = load_manifest(export, "export").task
    assert isinstance(task, Translation)
    tokenizer = load_translation_tokenizer(export, task.source, task.target)
    sizes = zip(texts, map(len, tokenizer.encode(texts)), map(len, tokenizer.encode(references)))
    kept = [(text, target) for text, source, target in sizes if max(source, target) <= _MOST_TOKENS]
    return [text for text, _ in kept], [target for _, target in kept]


def _candidate(name: str, url: str, lengths: Sequence[int]) -> Candidate:
    served = open_predictor("model", url=url)
    served.close()
    assert isinstance(served.task, Translation)
    generation = override(served.task, {"num_beams": 1})
    forced = tuple(dataclasses.replace(generation, min_length=n + 1, max_length=n + 1) for n in lengths)
    return Candidate(name, Server(url, "model", served.task, forced), generation=generation)
