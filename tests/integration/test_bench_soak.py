"""bench/soak.py from end to end: three tiny models of three tasks on one server, for some seconds, or for SOAK_MINUTES.

From 5 minutes, memory and open files must stay level.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from language_models import write_export
from paths import ROOT

from deploykit.tasks.text_generation.chat_template import CHATML

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.3"))


def test_mixed_tasks_end_with_a_verdict(tiny_export: Path, tiny_translation: Path, tmp_path: Path) -> None:
    language_model = write_export(tmp_path / "lm", template=CHATML, max_position_embeddings=1024)
    out = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "bench/soak.py"), "--minutes", str(MINUTES), "--every", "2", "--clients", "6", "--longest", "20",
               "--pause", "0.02", "--max-cache-mb", "20", "--out", str(out)]  # fmt: skip
    command += [
        word for export in (tiny_export, tiny_translation, language_model) for word in ("--export", str(export))
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {name for name in record["outcomes"] if not name.endswith(": as expected")} == set()
    asked = {name.split(":")[0] for name in record["outcomes"]}
    assert asked >= {"classify", "translate", "whole", "stream", "leaves"}
    assert sum(record["outcomes"].values()) > 50
    assert {"classify", "translate", "whole", "stream"} <= record["minutes"][0].keys()
    assert all(record["minutes"][0][kind]["p99_ms"] > 0 for kind in ("classify", "translate"))
    assert len(record["samples"]) >= 5
    assert all(sample["memory_mb"] > 10 and sample["open_files"] > 10 for sample in record["samples"])
    if MINUTES >= 5:
        grown = [reason for reason in record["verdict"]["reasons"] if reason.startswith(("memory", "open files"))]
        assert not grown, "in less time a line through the samples says nothing"
    last = record["samples"][-1]
    assert (last["running"], last["waiting"]) == (0, 0)
