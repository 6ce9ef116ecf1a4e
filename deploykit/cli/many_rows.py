"""Options and steps of the commands that answer many rows: on a Ray cluster, and folders of files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploykit.errors import UsageError

if TYPE_CHECKING:
    from deploykit.data.answer_file import Answered, Spread
    from deploykit.data.answer_folder import Answer

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
    help="JSON lines, one for each row of --input, in order; for a folder or bucket of files, a folder or bucket.",
)


@contextlib.contextmanager
def spread_over(ray: str | None, target: str, where: Mapping[str, Any], identity: str) -> Iterator[Spread | None]:
    """Yield what spreads rows over a Ray cluster, or None where ``ray`` is not given."""
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


def answer_all(source: str, output: str, answer: Answer, *, settings: str, force: bool) -> Answered:
    """Answer a file, or each file of a folder or bucket if ``output`` is one too."""
    from deploykit.data.answer_folder import answer_folder, is_folder

    if is_folder(output) and ("://" in source or Path(source).is_dir()):
        return answer_folder(source, output, answer, settings=settings, force=force)
    return answer(source, Path(output))
