from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli_parts.command import Result, deploykit_command


@deploykit_command(
    help="Print the figures that changed, beyond the noise, between two files of deploykit bench --output."
)
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def command(*, old: Path, new: Path) -> Result:
    return compare_files(old, new)


def compare_files(old: Path, new: Path) -> Result:
    """Compare two records of measurements."""
    from deploykit.bench.compare import compare
    from deploykit.report.record import read_record

    records = [read_record(path) for path in (old, new)]
    found = compare(*records)
    lines = [
        f"{whose}: {path}, measured {record['started']}"
        for whose, path, record in zip(("old", "new"), (old, new), records)
    ]
    return {"old": str(old), "new": str(new), **found.to_json()}, "\n".join([*lines, "", found.to_text()])
