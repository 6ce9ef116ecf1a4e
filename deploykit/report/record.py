"""Bench records read back: those of ``deploykit bench``, and those of the suites under bench/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import ArtifactError

Record = Mapping[str, Any]

_SERVERS = ("serving", "serving-shape")
_REMEDY = "pass what deploykit bench --output or a suite under bench/ wrote"


def read_record(path: Path) -> Record:
    """Raises ArtifactError, which names the file, for one that is missing, broken, or no record of a bench."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", _REMEDY) from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ArtifactError(f"{path}: is not JSON: {error}", _REMEDY) from None
    if isinstance(record, dict) and record.get("schema") not in (None, SCHEMA):
        raise ArtifactError(
            f"{path}: was written in schema {record['schema']!r}, and this is deploykit with schema {SCHEMA}",
            "measure again, or use the deploykit that wrote it",
        )
    try:
        _touch(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: is no record of a bench, or damaged: {error}", _REMEDY) from None
    return record


def results_of(record: Record) -> dict[str, Record]:
    """What ``BenchResult.to_json`` gave, by key: one under "" of ``deploykit bench``; a suite's workloads, and its servers."""
    if "candidates" in record:
        return {"": record}
    results = {workload["key"]: workload["bench"] for workload in record.get("workloads", ())}
    return results | {key: record[key] for key in _SERVERS if key in record}


def _touch(record: Record) -> None:
    """Fails where something is missing that readers count on."""
    _ = record["schema"], record["started"], record["machine"]["packages"]
    results = results_of(record)
    if not results:
        raise KeyError("no candidates")
    for result in results.values():
        _ = result["settings"]["rounds"], result["texts"]["rows"], result["warnings"]
        for candidate in result["candidates"]:
            _ = candidate["name"], candidate["task"], candidate["metrics"], candidate["peak_memory_mb"]
            for s in candidate["scenarios"]:
                _ = s["scenario"]["name"], s["scenario"]["kind"], s["tokens_per_s"]
                _ = s["throughput_per_s"]["median"], s["latency_ms"]["p99"]


SCHEMA = 1
