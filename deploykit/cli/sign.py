from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli_parts.command import Result, deploykit_command


@deploykit_command(
    help="Sign each TARGET: an export, a model's folder in a repository, or a bundle. The signature goes to TARGET/model.sig, or for a file to TARGET.sig."
)
@click.argument("targets", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--key", metavar="PRIVATE_KEY", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="Private key of an elliptic curve (PEM).")  # fmt: skip
def command(*, targets: tuple[Path, ...], key: Path) -> Result:
    from deploykit.signatures import sign

    signatures = [str(sign(target, key)) for target in targets]
    return {"signatures": signatures}, "\n".join(f"{signature}: written" for signature in signatures)
