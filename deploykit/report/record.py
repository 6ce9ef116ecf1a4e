"""Read bench records: those of ``deploykit bench``, and those of the suites under bench/."""

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
    """Read a record. Raises ArtifactError naming the file if it is missing, damaged, or not a bench record."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", _REMEDY) from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ArtifactError(f"{path}: is not JSON: {error}", _REMEDY) from None
    if isinstance(record, dict) and record.get("schema") not in (None, SCHEMA):
        raise ArtifactError(
            f"{path}: has schema {record['schema']!r}; this deploykit reads schema {SCHEMA}",
            "measure again, or use the version of deploykit that wrote it",
        )
    try:
        _touch(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: is not a bench record, or is damaged: {error}", _REMEDY) from None
    return record


def results_of(record: Record) -> dict[str, Record]:
    """Return the results of ``BenchResult.to_json`` by key.

    The key is "" for ``deploykit bench``; a suite has one for each workload, and one for its servers.
    """
    if "candidates" in record:
        return {"": record}
    results = {workload["key"]: workload["bench"] for workload in record.get("workloads", ())}
    return results | {key: record[key] for key in _SERVERS if key in record}


def _touch(record: Record) -> None:
    """Access everything that readers rely on, so that a missing part fails here."""
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


def own_cpu_ms(cpu_ms: Mapping[str, float]) -> float | None:
    """Return what a request costs a server besides its engine; None where the engine's share is not known."""
    return cpu_ms["triton"] + cpu_ms["model"] - cpu_ms["engine"] if {"model", "engine"} <= cpu_ms.keys() else None


def median_cpu_ms(scenario: Record) -> dict[str, float] | None:
    """Return the CPU time of a request by process and stage, the median of the rounds; None if it was not measured."""
    found = scenario.get("cpu_ms")
    return {name: each["median"] for name, each in found.items()} if found else None


def cpu_words(cpu_ms: Mapping[str, float]) -> str:
    """Return the CPU time of a request by process, the stages in it, and the server's own share, in ms."""
    stages = ", ".join(f"{name} {cpu_ms[name]:.2f}" for name in ("tokenizer", "engine") if name in cpu_ms)
    parts = [f"client {cpu_ms['client']:.2f}", f"Triton {cpu_ms['triton']:.2f}"]
    if "model" in cpu_ms:
        parts.append(f"model process {cpu_ms['model']:.2f}" + (f" ({stages})" if stages else ""))
    own = own_cpu_ms(cpu_ms)
    return ", ".join(parts) + ("" if own is None else f"; all but client and engine {own:.2f}")
