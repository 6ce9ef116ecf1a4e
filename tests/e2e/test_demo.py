"""The README's demo, typed as `make demo` types it, on few rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from deploykit.tasks.classification.demo import SENTENCES


def test_the_demo_ends_with_predictions_a_table_and_a_report(tmp_path: Path, minilm: Path, tweets: Path) -> None:
    for folder, cached in (("minilm", minilm), ("tweets", tweets.parent)):
        shutil.copytree(cached, tmp_path / folder)
    words = ("-m", "deploykit", "demo", "--output-dir", str(tmp_path), "--max-train-samples", "300", "--seconds", "0.2")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = done.stdout + done.stderr
    assert all(sentence in shown for sentence in SENTENCES)
    report = tmp_path / "report.html"
    assert f"open {report}" in done.stdout
    assert "sentences/s" in done.stdout
    for model in ("checkpoint fp32 (", "export INT8 (", "served INT8 ("):
        assert model in done.stdout
    assert "</html>" in report.read_text(encoding="utf-8")
