from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli_parts.command import Result, deploykit_command
from deploykit.cli_parts.shared_options import OUTPUT_DIR


@deploykit_command(help="Verify BUNDLE, a file that deploykit bundle wrote, and unpack it.")
@click.argument("bundle", type=click.Path(path_type=Path))
@OUTPUT_DIR
@click.option("--public-key", type=click.Path(path_type=Path), help="First verify the signature with this public key.")
def command(*, bundle: Path, out: Path, public_key: Path | None) -> Result:
    return unpack_bundle(bundle, out, public_key)


def unpack_bundle(bundle: Path, out: Path, public_key: Path | None) -> Result:
    """Unpack a bundle to the new folder ``out``."""
    from deploykit.jetson.bundle import unpack

    folder = unpack(bundle, out, public_key=public_key)
    return {"out": str(folder)}, f"{folder}: verified and unpacked\nnext: {folder}/run.sh check"
