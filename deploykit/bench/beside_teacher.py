"""Compare the export of a student with its teacher and its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploykit.artifacts import MANIFEST, load_manifest, new_file
from deploykit.bench.rows import read_rows
from deploykit.bench.scenarios import ClosedLoop
from deploykit.bench.targets import bench_targets
from deploykit.errors import DeploykitError
from deploykit.metric_titles import shown_metrics, verdict, with_interval
from deploykit.report.pages import write_report
from deploykit.runtime.served import DEFAULT_URL
from deploykit.tasks.protocol import GraphKind
from deploykit.tasks.registry import get_task
from deploykit.text_table import text_table

_ROWS: Mapping[GraphKind, int] = {"encoder": 500, "encoder-decoder": 100, "decoder": 20}
"""Maximum number of held-out rows that each model answers."""
_LONGEST_ANSWER = 64
_SECONDS, _WARMUP_S = 1.0, 0.5


def beside_teacher(checkpoint: Path, export: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return a record of ``deploykit bench``, one caller, with the teacher of the run ``checkpoint``, the run itself, and its
    ``export``; None if it has no teacher, or if the teacher no longer exists.

    The record and its page are EXPORT.teacher.json and .html. Earlier measurements of the same export are reused.
    """
    if not (checkpoint / MANIFEST).exists():
        return None
    run, exported = load_manifest(checkpoint, verify=False), load_manifest(export, verify=False)
    splits = [path for name in ("test", "validation") if (path := checkpoint / "splits" / f"{name}.jsonl").is_file()]
    if not (teacher := run.options.get("teacher")) or not splits:
        return None
    kept, page = (export.with_name(f"{export.name}.teacher.{kind}") for kind in ("json", "html"))
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found.get("export") == exported.digest:
            return found
    if Path(teacher).is_absolute() and not Path(teacher).exists():
        say(f"not compared with its teacher: {teacher} no longer exists")
        return None
    say(f"measuring the teacher {teacher}, the student and its export side by side")
    kind = run.task.graph_kind
    try:
        texts, truth = read_rows(str(splits[0]), run.task, most=_ROWS[kind], seed=0)
        record = bench_targets(
            [teacher, str(checkpoint), str(export)], texts, truth, url=DEFAULT_URL, scenarios=[ClosedLoop(1)],
            generation={"max_new_tokens": _LONGEST_ANSWER} if kind == "decoder" else {}, seconds=_SECONDS,
            warmup_s=_WARMUP_S, memory=False,
        ).to_json()  # fmt: skip
        for role, candidate in zip(("teacher", "student", "export"), record["candidates"]):
            candidate["name"] = f"{role}: {candidate['name']}"
        write_report(record, page)
    except DeploykitError as error:
        say(f"not compared with its teacher: {error.message}: {error.remedy}")
        return None
    for warning in record["warnings"]:
        say(f"warning: {warning}")
    record["export"] = exported.digest
    with new_file(kept) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"{page}: written")
    return record


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return name, metrics with intervals, differences from the teacher, ``size_mb`` and ``p50_ms`` of each model."""
    lines = []
    for candidate in record["candidates"]:
        shown = shown_metrics(candidate["metrics"], get_task(candidate["task"]).headline)
        intervals = {name: low_high for name, low_high in candidate["metrics"]["intervals"].items() if name in shown}
        lines.append(
            {
                "name": candidate["name"],
                **{name: candidate["metrics"][name] for name in shown},
                "intervals": intervals,
                "differences": {
                    name: found for name, found in (candidate["differences"] or {}).items() if name in shown
                },
                "size_mb": candidate["size_mb"],
                "p50_ms": candidate["scenarios"][0]["latency_ms"]["p50"]["median"],
            }
        )
    return lines


def render(lines: list[dict[str, Any]]) -> str:
    """Return ``figures`` as a table for a terminal."""
    titles = shown_metrics(lines[0], "")
    rows = (
        [
            line["name"],
            *(with_interval(line, name) for name in titles),
            "-" if line["size_mb"] is None else f"{line['size_mb']:.1f}",
            f"{line['p50_ms']:.2f}",
            verdict(line["differences"], titles) if line["differences"] else "",
        ]
        for line in lines
    )
    return text_table(["", *titles.values(), "MB", "p50 ms", "from the teacher"], rows, left=(0, len(titles) + 3))
