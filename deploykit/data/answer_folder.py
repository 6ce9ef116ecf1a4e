"""Answer each file of a folder or a bucket with a file of answers; a killed run is continued."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from deploykit import artifacts
from deploykit.data.answer_file import Answered, read_answered
from deploykit.data.packages import import_data_package
from deploykit.errors import ArtifactError, DataError, MissingDependencyError

Answer = Callable[[str, Path], Answered]
"""Answers the rows of a file, and writes a file of JSON lines."""


def is_folder(output: str) -> bool:
    """Return whether an output is a folder: its name has no suffix, or it is a bucket's."""
    return "://" in output or not Path(output).suffix


def answer_folder(source: str, output: str, answer: Answer, *, settings: str, force: bool) -> Answered:
    """Write the answers to each file NAME below ``source`` to NAME.jsonl below ``output``.

    Both are folders, or URLs that fsspec knows, such as s3://BUCKET/FOLDER, whose files are copied to this machine one at a
    time. Files whose names begin with "." or "_" are skipped. A file that an earlier run with the same ``settings``
    (all that determines answers but the rows) has written is kept, if its rows are still the same file.

    Raises ArtifactError if ``output`` has the answers of another run, unless ``force`` is set; DataError if there are no
    files; MissingDependencyError.
    """
    files, root = _file_system(source)
    written, target = _file_system(output)
    below = (str(PurePosixPath(path).relative_to(root)) for path in files.find(root))
    names = sorted(name for name in below if not any(part[0] in "._" for part in name.split("/")))
    if not names:
        raise DataError(f"{source}: has no files of rows", "name a folder of .csv, .jsonl or .parquet files")
    rows = resumed = 0
    problems: list[str] = []
    for name in names:
        out = PurePosixPath(target) / f"{name}.jsonl"
        mark = str(out.with_name(f".{out.name}.inputs"))
        key = artifacts.digest_of(settings, files.checksum(f"{root}/{name}"))
        known = written.exists(mark) and written.cat_file(mark).decode() == key
        if written.exists(str(out)) and not force:
            if not known:
                raise ArtifactError(
                    f"{output}/{name}.jsonl: already exists, from another model, other input or other options",
                    "choose another --output, or pass --force to replace it",
                )
            with written.open(str(out), "rb") as lines:
                done = read_answered(lines)
        else:
            written.makedirs(str(out.parent), exist_ok=True)
            written.pipe_file(mark, key.encode())  # written before the answers, so that existing answers always have it
            done = _answer_copy(files, f"{root}/{name}", written, out, answer)
        rows, resumed = rows + done.rows, resumed + done.resumed
        problems += [f"{name}: {problem}" for problem in done.problems]
    return Answered(rows, resumed, tuple(problems))


def _answer_copy(files: Any, source: str, written: Any, out: PurePosixPath, answer: Answer) -> Answered:
    """Answer the rows of a file; copy a remote file to this machine first, and its answers back."""
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        local, answers = Path(source), Path(out)
        if not _is_local(files):
            local = Path(folder) / PurePosixPath(source).name
            files.get_file(source, str(local))
        if not _is_local(written):
            answers = Path(folder) / out.name
        done = answer(str(local), answers)
        if not _is_local(written):
            written.put_file(str(answers), str(out))
    return done


def _file_system(url: str) -> tuple[Any, str]:
    fsspec = import_data_package("fsspec.core")
    try:
        files, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol of another package, or of none
        raise MissingDependencyError(f"{url}: {error}", "install the fsspec package for this kind of URL") from error
    return files, root.rstrip("/")


def _is_local(files: Any) -> bool:
    return "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))
