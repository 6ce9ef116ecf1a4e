"""Options and steps of the commands that answer many rows: on a Ray cluster, and folders of files."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli_parts.command import progress_bar
from deploykit.errors import UsageError

if TYPE_CHECKING:
    from deploykit.data.answer_file import Answered, Spread
    from deploykit.data.reading import Reading
    from deploykit.tasks.protocol import Predictor

_DEFAULT = "RAY_ADDRESS, or this machine"
RAY = click.option(
    "--ray",
    is_flag=False,
    flag_value=_DEFAULT,
    metavar="[ADDRESS]",
    help="Answer the rows of --input on this Ray cluster; without ADDRESS on that of RAY_ADDRESS, or a new one on this machine.",
)
OUTPUT = click.option(
    "--output",
    metavar="FILE|FOLDER",
    help="Answers to --input, in order: .jsonl; with predict and answer also .csv, .tsv or .parquet; for a folder or bucket of files, a folder or bucket.",
)


@contextlib.contextmanager
def _spread_over(ray: str | None, target: str, where: Mapping[str, Any], identity: str) -> Iterator[Spread | None]:
    """Yield a function that spreads rows over a Ray cluster, or None without ``ray``."""
    if ray is None:
        yield None
        return
    from deploykit.ray_pool import RayPool

    with RayPool("" if ray == _DEFAULT else ray, target, where, identity) as pool:
        yield pool.spread


def refuse_ray(ray: str | None) -> None:
    """Raise UsageError for --ray without --input."""
    if ray is not None:
        raise UsageError("--ray is for --input", "leave it out, or give --input and --output")


def answer_all(
    answer: Callable[..., Answered], predictor: Predictor, target: str, source: str, output: str, *, where: Mapping[str, Any],
    ray: str | None, reading: Reading, force: bool, of_answers: object, rows: str = "rows",
) -> Answered:  # fmt: skip
    """Answer a file, or each file of a folder or bucket if ``output`` is one too.

    ``answer`` takes the predictor, a source and a file to write, and ``identity``, ``reading``, ``force``, ``progress`` and
    ``spread``. ``of_answers`` are the other settings that determine the answers; ``rows`` is what the progress counts.
    """
    from deploykit.data.answer_folder import answer_folder, is_folder
    from deploykit.tasks.opening import identity_of

    if os.path.exists(source) and "://" not in output and Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(f"--output {output}: is what --input reads, or is in its folder", "name another --output")
    digest = identity_of(target, predictor)
    with _spread_over(ray, target, where, digest) as spread, progress_bar(rows) as progress:
        one = functools.partial(
            answer,
            predictor,
            identity=f"{digest} {where}",
            reading=reading,
            force=force,
            progress=progress,
            spread=spread,
        )
        if is_folder(output) and ("://" in source or Path(source).is_dir()):
            settings = f"{digest} {where} {of_answers} {reading.key()}"
            return answer_folder(source, output, one, settings=settings, force=force)
        return one(source, Path(output))
