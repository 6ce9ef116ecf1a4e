"""A file of rows that is not there is told before torch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.data.read import check_file
from deploykit.errors import DataError


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "model", "--train", "none.csv", "--output-dir", "run"),
        ("finetune", "model", "--train", "rows.csv", "--validation", "none.csv", "--output-dir", "run"),
        ("evaluate", "model", "--data", "none.csv"),
    ],
)
def test_a_missing_file_is_told_at_once(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "model").mkdir()
    for name, text in (("config.json", '{"model_type": "bert"}'), ("model.safetensors", ""), ("tokenizer.json", "{}")):
        (tmp_path / "model" / name).write_text(text)
    (tmp_path / "rows.csv").write_text("text,label\nw1,good\nw2,bad\n")
    program = "import sys; sys.modules['torch'] = None; from deploykit.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "none.csv: no such file" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_two_files_of_pairs_are_looked_for_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.en.gz").touch()
    (tmp_path / "a.fr.gz").touch()
    check_file(f"{tmp_path}/a.en.gz,{tmp_path}/a.fr.gz")
    check_file("a name at the hub, or a model")
    with pytest.raises(DataError, match=r"^b\.fr\.gz: no such file"):
        check_file(f"{tmp_path}/a.en.gz,b.fr.gz")
