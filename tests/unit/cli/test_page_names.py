from pathlib import Path

import pytest
from click.testing import CliRunner

from deploykit.cli import main


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "model", "--data", "rows.csv", "--report", "rows.csv", "--force"),
        ("explain", "model", "--rows", "rows.csv", "--output", "rows.csv", "--force"),
        ("answer", "model", "--input", "rows.csv", "--page", "rows.csv"),
    ],
)
def test_a_page_does_not_replace_a_file_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,label\na,b\n")
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, Path("rows.csv").read_text()) == (2, "text,label\na,b\n")
    assert "rows.csv: an HTML page is written" in result.stderr
