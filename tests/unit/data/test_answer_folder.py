"""Buckets, as fsspec's own in memory, are answered file by file."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from deploykit.data.answer_file import Answered
from deploykit.data.answer_folder import answer_folder
from deploykit.errors import ArtifactError, DataError, MissingDependencyError


def test_files_of_a_bucket_are_answered_once(tmp_path: Path) -> None:
    bucket = fsspec.filesystem("memory")
    bucket.pipe({"/in/a.txt": b"x\ny\n", "/in/b/c.txt": b"z\n", "/in/_temporary/d.txt": b"w\n"})
    asked: list[str] = []

    def answer(source: str, out: Path) -> Answered:
        lines = Path(source).read_text().splitlines()
        asked.extend(lines)
        out.write_text(
            "".join('{"origin": "r", "error": "bad"}\n' if line == "z" else '{"origin": "r"}\n' for line in lines)
        )
        return Answered(len(lines), 0, ("r: bad",) if "z" in lines else ())

    def run(settings: str = "", *, force: bool = False) -> Answered:
        return answer_folder("memory://in", "memory://out", answer, settings=settings, force=force)

    assert run() == Answered(3, 0, ("b/c.txt: r: bad",))
    assert sorted(bucket.find("/out")) == [
        "/out/.a.txt.jsonl.inputs", "/out/a.txt.jsonl", "/out/b/.c.txt.jsonl.inputs", "/out/b/c.txt.jsonl",
    ]  # fmt: skip
    bucket.rm("/out/a.txt.jsonl")
    assert run() == Answered(3, 1, ("b/c.txt: r: bad",))
    assert asked == ["x", "y", "z", "x", "y"]
    with pytest.raises(ArtifactError, match=r"a\.txt\.jsonl: already exists"):
        run("another model")
    assert run("another model", force=True).resumed == 0
    with pytest.raises(DataError, match="has no files of rows"):
        answer_folder("memory://nothing", "memory://out", answer, settings="", force=False)
    with pytest.raises(MissingDependencyError, match="nosuch://in"):
        answer_folder("nosuch://in", "memory://out", answer, settings="", force=False)
