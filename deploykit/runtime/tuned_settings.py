"""Record the engine and precision that ``deploykit tune`` found best: ``--engine auto`` uses them on this machine.

The record is a file in the export's folder. The manifest does not list it, because it describes a machine and not the
export.
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
class TunedSettings:
    """The best engine and precision of the export ``digest``, measured on ``cpus`` CPUs of the model ``cpu``."""

    engine: str
    precision: str
    digest: str
    cpu: str
    cpus: int
    slo: str
    rate_per_s: float


def write_tuned(export: Path, manifest: Manifest, *, engine: str, precision: str, slo: str, rate_per_s: float) -> Path:
    """Write the record, replacing an earlier one. Returns its path."""
    tuned = TunedSettings(engine, precision, manifest.digest, cpu_name(), available_cpus(), slo, rate_per_s)
    with new_file(export / TUNED) as file:
        file.write_text(json.dumps(asdict(tuned), indent=1) + "\n", encoding="utf-8")
    return export / TUNED


def read_tuned(path: Path, manifest: Manifest) -> TunedSettings | None:
    """Return the record, or None unless it was measured for these files on such a machine and its engine runs here."""
    try:
        tuned = TunedSettings(**json.loads((path / TUNED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    here = (manifest.digest, cpu_name(), available_cpus())
    known = tuned.engine in ENGINES and ENGINES[tuned.engine].installed
    return tuned if known and (tuned.digest, tuned.cpu, tuned.cpus) == here else None
