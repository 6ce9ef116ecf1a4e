from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli.unpack import unpack_bundle
from deploykit.cli_parts.command import Result, deploykit_command, human_bytes, option, say
from deploykit.cli_parts.shared_options import FORCE, NAME_HELP, REQUIRE_SIGNATURE
from deploykit.errors import UsageError


@deploykit_command(help="Pack the export TARGET into one file that a Jetson builds, verifies and serves offline.")
@click.argument("export", metavar="TARGET", type=click.Path(path_type=Path), required=False)
@option("--device", "target", aliases=["--target"], help="Board: orin-nano, orin-nx, agx-orin or thor.")
@click.option("--jetpack", help="JetPack version of the device, such as 6.2.")
@option("--output", "out", aliases=["--out"], required=True, type=click.Path(path_type=Path),
        help="File (.tar.gz) to write.")  # fmt: skip
@click.option("--name", show_default="the export's folder", help=NAME_HELP)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="Precision to build on the device: auto (INT8 if available), int8 or fp16.",
)
@click.option("--data", help="Texts to verify the engine with. [default: the test rows in the export]")
@click.option("--wheels", type=click.Path(path_type=Path),
              help="Include the device's Python packages from this folder; missing packages are downloaded into it.")  # fmt: skip
@REQUIRE_SIGNATURE
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Sign the bundle with this private key (PEM).")
@click.option("--unpack", type=click.Path(path_type=Path), hidden=True)
@click.option("--public-key", type=click.Path(path_type=Path), hidden=True)
@FORCE
def command(
    *, export: Path | None, out: Path, target: str | None, jetpack: str | None, unpack: Path | None,
    public_key: Path | None, force: bool, **options: Any,
) -> Result:  # fmt: skip
    from deploykit.jetson import bundle

    if unpack is not None:
        if export is not None or target or jetpack or force or any(v for k, v in options.items() if k != "precision"):
            raise UsageError(
                "--unpack takes only --out and --public-key", "use deploykit unpack BUNDLE --output-dir DIR"
            )
        return unpack_bundle(unpack, out, public_key)
    if public_key is not None:
        raise UsageError(
            "--public-key is for deploykit unpack", "leave it out, or sign the new bundle with --sign PRIVATE_KEY"
        )
    if export is None or target is None or jetpack is None:
        raise UsageError("TARGET, --device and --jetpack are required",
                         "deploykit bundle exports/a --device orin-nano --jetpack 6.2 --output a.tar.gz")  # fmt: skip
    done = bundle.bundle(export, out, target, jetpack, force=force, say=say, **options)
    d = done.description
    text = [
        f"{out}: written ({human_bytes(done.size_bytes)}, {done.files} files)",
        f"for {d.target}, JetPack {d.jetpack} (TensorRT {d.tensorrt}, Python {d.python}); builds {' or '.join(d.graphs)}, "
        f"{d.profile}, workspace {d.workspace_mib} MiB; {'with' if d.wheels else 'without'} wheels",
        "without TensorRT, native runs it on the board's CPU" if done.native else "without native for the board's CPU",
        f"sha256 {done.sha256}",
        *([f"{done.signature}: written"] if done.signature else []),
        f"on the device: tar -xzf {out.name} && {d.name}-{d.target}/run.sh",
    ]
    record = {"out": str(out), "name": d.name, "target": d.target, "jetpack": d.jetpack, "tensorrt": d.tensorrt,
              "python": d.python, "precisions": list(d.graphs), "profile": d.profile, "workspace_mib": d.workspace_mib,
              "wheels": d.wheels, "native": done.native, "files": done.files, "size_bytes": done.size_bytes, "sha256": done.sha256,
              "signature": str(done.signature) if done.signature else None}  # fmt: skip
    return record, "\n".join(text)
