from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    CALIBRATION_ROWS,
    ENCODING,
    FORCE,
    METHODS,
    Result,
    deploykit_command,
    human_bytes,
    say,
)
from deploykit.errors import UsageError
from deploykit.tensorrt.build import BUILDERS, GPU, PRECISIONS, EngineOptions


@deploykit_command(help="Export a checkpoint to ONNX, optionally calibrated INT8.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the export to.")
@click.option("--int8", is_flag=True, help="Also write INT8 graphs, calibrated and checked.")
@click.option("--int4", is_flag=True, help="Also write a language model's linear layers in INT4.")
@click.option("--calibration", default="train", show_default=True,
              help="A split of the run, a file of rows, or what deploykit calibrate wrote.")  # fmt: skip
@CALIBRATION_ROWS
@click.option("--method", type=METHODS, default="minmax", show_default=True)
@click.option("--max-drop", type=float, default=0.5, show_default=True,
              help="Points of macro-F1, or of BLEU and of chrF, that INT8 may lose; percent of a language model's perplexity.")  # fmt: skip
@click.option("--smooth-quant", type=float, is_flag=False, flag_value=0.5, metavar="[ALPHA]",
              help="Move outliers of a classifier's activations into the weights before INT8; ALPHA from 0 to 1, 0.5 if "
              "left out.")  # fmt: skip
@click.option("--data", help="Rows to measure on (default: the run's test rows).")
@click.option("--measure-rows", type=int, default=0, help="Most of them to use [default: all; 500 to translate].")
@click.option("--trt", is_flag=True, help="Also build TensorRT engines.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS),
              help="Of an engine; may be repeated [default: fp16; with --int8 also int8].")  # fmt: skip
@click.option("--profile", "profiles", multiple=True, metavar="batch=MIN:OPT:MAX,length=MIN:OPT:MAX",
              help="Shapes of an engine, of a translator also past=MIN:OPT:MAX, the positions of its caches; may be "
              "repeated [default: one over all lengths].")  # fmt: skip
@click.option("--workspace", default="1GiB", show_default=True, help="Most memory for building an engine.")
@click.option("--timing-cache", help="File that remembers how fast kernels were, made if missing.")
@click.option("--builder", type=click.Choice(BUILDERS), default="auto", show_default=True,
              help="auto: TensorRT where there is a GPU, else TensorRT-RTX.")  # fmt: skip
@click.option("--source", help="Language of a translation checkpoint that was trained elsewhere.")
@click.option("--target", "targets", multiple=True,
              help="Language it translates into. GPU of an engine: portable (the default), this-gpu, or like sm_86.")  # fmt: skip
@ENCODING
@FORCE
def command(
    *, checkpoint: Path, out: Path, force: bool, trt: bool, precisions: tuple[str, ...], profiles: tuple[str, ...],
    workspace: str, targets: tuple[str, ...], timing_cache: str | None, builder: str, int8: bool, **values: Any,
) -> Result:  # fmt: skip
    gpus = [target for target in targets if re.fullmatch(GPU, target)]
    languages = [target for target in targets if target not in gpus]
    if max(len(gpus), len(languages)) > 1:
        raise UsageError(f"--target is given twice: {', '.join(targets)}", "give one language, and one GPU")
    if not trt and (precisions or profiles or timing_cache or gpus or builder != "auto"):
        raise UsageError(
            "--precision, --profile, --timing-cache, --builder and a GPU as --target are for engines", "add --trt"
        )
    wanted = precisions or (("fp16", "int8") if int8 else ("fp16",))
    gpu = gpus[0] if gpus else "portable"
    engines = EngineOptions(wanted, profiles, workspace, gpu, timing_cache, builder) if trt else None
    values["target"] = languages[0] if languages else None
    from deploykit.export.run import export
    from deploykit.graphs.export_options import ExportOptions
    from deploykit.quantization.tables import render

    options = ExportOptions(int8=int8 or (trt and "int8" in wanted), trt=engines, **values)
    done = export(checkpoint, out, options, force=force, say=say)
    metrics = done.manifest.metrics
    sizes = {
        n: r.bytes
        for n, r in done.manifest.files.items()
        if n.endswith((".onnx", ".onnx_data", ".bin", ".safetensors", ".engine"))
    }
    record: dict[str, Any] = {
        "out": str(out),
        "reused": done.reused,
        "digest": done.manifest.digest,
        "parity": metrics["parity"],
        "quantization": metrics.get("quantization"),
        "accuracy": metrics["accuracy_table"],
        "engines": metrics.get("engines", []),
        "rows": metrics["rows"],
        "size_bytes": sizes,
    }
    text = [
        f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}",
        f"on {metrics['rows']:,} rows:",
        *render(metrics["accuracy_table"]),
        *(f"{name}: {human_bytes(size)}" for name, size in sizes.items()),
        *(
            f"{e['file']}: {e['builder']} {e['version']} for {e['target']}, {e['int8_gemms']} INT8 matrix products"
            for e in record["engines"]
        ),
    ]
    return record, "\n".join(text)
