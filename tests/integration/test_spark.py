"""The Spark example of docs/cluster.md, run in Spark's local mode."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from paths import ROOT

import deploykit

PACKAGES = os.environ.get("SPARK_PACKAGES", "")
"""The folder that ``pip install --target`` put pyspark in."""

pytestmark = [
    pytest.mark.skipif(not PACKAGES, reason="set SPARK_PACKAGES, as make interop does"),
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
]


def test_the_example_of_the_docs_answers_each_row(tiny_export: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    [code] = re.findall(r"opens the model once:\n\n(.*?)\n\n## ", page, re.DOTALL)
    code = textwrap.dedent(code).replace('"/models/reviews"', repr(str(tiny_export)))
    assert len(code.splitlines()) < 25
    texts = [*(f"w{i} w{i + 1}" for i in range(50)), None]
    (tmp_path / "reviews").mkdir()
    rows = pd.DataFrame({"id": range(len(texts)), "text": texts, "other": 1.5})
    for part in (0, 1):  # a task for each
        rows[part::2].to_parquet(tmp_path / "reviews" / f"{part}.parquet")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), PACKAGES]), "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = pd.read_parquet(tmp_path / "answers").sort_values("id")
    with deploykit.load(tiny_export, threads=1) as model:
        expected = [answer.fields for answer in model.predict([text or "" for text in texts])]
    assert found["id"].tolist() == list(range(len(texts)))
    assert found["label"].tolist() == [fields["label"] for fields in expected]
    assert found["score"].tolist() == pytest.approx([fields["score"] for fields in expected])
