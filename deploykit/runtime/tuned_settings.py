"""What ``deploykit tune`` found best of an export on this machine: what ``--engine auto`` then means.

A file beside the export's own, which its manifest does not name: it says something of a machine, and the export
stays what it is without it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from deploykit.artifacts import Manifest, new_file
from deploykit.hardware import available_cpus, cpu_name
from deploykit.runtime.engines import ENGINES

TUNED = "tuned.json"


@dataclass(frozen=True)
class Tuned:
    """``digest`` is the export's; ``cpu`` and ``cpus`` are where it was measured."""

    engine: str
    precision: str
    digest: str
    cpu: str
    cpus: int
    slo: str
    rate_per_s: float


def write_tuned(export: Path, manifest: Manifest, *, engine: str, precision: str, slo: str, rate_per_s: float) -> Path:
    """Keep what was measured here, in place of what was before. Returns the file."""
    tuned = Tuned(engine, precision, manifest.digest, cpu_name(), available_cpus(), slo, rate_per_s)
    with new_file(export / TUNED) as file:
        file.write_text(json.dumps(asdict(tuned), indent=1) + "\n", encoding="utf-8")
    return export / TUNED


def read_tuned(path: Path, manifest: Manifest) -> Tuned | None:
    """What was measured of just these files on a machine like this one, if its engine can run here; None otherwise."""
    try:
        tuned = Tuned(**json.loads((path / TUNED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    here = (manifest.digest, cpu_name(), available_cpus())
    known = tuned.engine in ENGINES and ENGINES[tuned.engine].installed
    return tuned if known and (tuned.digest, tuned.cpu, tuned.cpus) == here else None
