from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.command import Result, deploykit_command, human_bytes, option, say
from deploykit.cli_parts.shared_options import (
    CALIBRATION,
    CALIBRATION_DATA,
    CALIBRATION_ROWS,
    CALIBRATION_SPLIT,
    FORCE,
    LABEL_COLUMN,
    METHODS,
    OUTPUT_DIR,
    SOURCE_LANG,
    TARGET_LANG_HELP,
    TEXT_COLUMN,
    reading_fields,
    with_calibration,
)
from deploykit.errors import UsageError
from deploykit.graphs.gguf_file import GGUF_TYPES
from deploykit.runtime.engines.native.causal_weights import CACHES
from deploykit.tensorrt.options import BUILDERS, GPU, PRECISIONS, EngineOptions, profiles_of_shapes, workspace_of_pools

_SHAPE = "input_ids:ROWSxTOKENS[,past:N]"


@deploykit_command(help="Export the checkpoint TARGET, a folder or a .gguf file, to ONNX, optionally calibrated INT8.")
@click.argument("checkpoint", metavar="TARGET", type=click.Path(path_type=Path))
@OUTPUT_DIR
@click.option("--int8", is_flag=True, help="Also write INT8 graphs, calibrated and checked.")
@click.option("--int4", is_flag=True, help="Also write the linear layers of a language model in INT4.")
@click.option(
    "--gguf",
    multiple=True,
    type=click.Choice(GGUF_TYPES),
    help="Also write a language model as GGUF, for llama.cpp; repeat.",
)
@click.option("--kv-cache-dtype", type=click.Choice(CACHES),
              help=f"Type of a language model's keys and values in the engine native.  [default: {CACHES[0]}]")  # fmt: skip
@CALIBRATION_SPLIT
@CALIBRATION_DATA
@click.option("--calib", help="Folder of a calibration that deploykit calibrate wrote, instead of calibrating again.")
@CALIBRATION
@CALIBRATION_ROWS
@click.option("--method", type=METHODS,
              help="Method for the ranges of activations; if given, a language model is calibrated too.  [default: minmax]")  # fmt: skip
@click.option("--max-drop", type=float, default=0.5, show_default=True,
              help="Points of macro-F1, or of BLEU and of chrF, that INT8 may lose; for a language model, percent of its perplexity.")  # fmt: skip
@click.option("--smooth-quant", type=float, is_flag=False, flag_value=0.5, metavar="[ALPHA]",
              help="Move outliers of activations into the weights before INT8; not for translators. ALPHA: 0 to 1 (default: 0.5).")  # fmt: skip
@click.option("--data", help="Rows to measure on (default: the run's test rows).")
@click.option(
    "--measure-rows", type=int, default=0, help="Maximum rows to measure on. [default: all; 500 for translation]"
)
@click.option(
    "--optimum", is_flag=True, help="Also write a translator's graphs in optimum's layout, to the folder optimum."
)
@click.option(
    "--beside-teacher/--no-beside-teacher", default=True, show_default=True,
    help="Compare the INT8 or INT4 export of a distilled run with its teacher and with the run.",
)  # fmt: skip
@click.option("--trt", is_flag=True, help="Also build TensorRT engines.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS),
              help="Precision of an engine; repeat. [default: fp16; with --int8 also int8]")  # fmt: skip
@click.option("--minShapes", "min_shapes", multiple=True, metavar=_SHAPE,
              help="Smallest shapes of an engine's profile, as trtexec takes them; past is the positions of a translator's "
              "caches. Give all three once for each profile [default: one over all lengths].")  # fmt: skip
@click.option("--optShapes", "opt_shapes", multiple=True, metavar=_SHAPE, help="Shapes to optimize the profile for.")
@click.option("--maxShapes", "max_shapes", multiple=True, metavar=_SHAPE, help="Largest shapes of the profile.")
@click.option("--profile", "profiles", multiple=True, hidden=True)
@option("--memPoolSize", "workspace", aliases=["--workspace"], metavar="workspace:SIZE", default="workspace:1GiB",
        show_default=True, help="Maximum memory for building an engine; without a unit in MiB.")  # fmt: skip
@option("--timingCacheFile", "timing_cache", aliases=["--timing-cache"],
        help="File that caches kernel timings; created if missing.")  # fmt: skip
@click.option("--builder", type=click.Choice(BUILDERS), default="auto", show_default=True,
              help="Engine builder. auto: TensorRT if there is a GPU, else TensorRT-RTX.")  # fmt: skip
@click.option("--gpu", help="GPU of an engine: this-gpu, or one like sm_86 [default: portable].")
@TEXT_COLUMN
@LABEL_COLUMN
@SOURCE_LANG
@click.option("--target-lang", help=TARGET_LANG_HELP)
@click.option("--target", "targets", multiple=True, hidden=True)
@reading_fields
@FORCE
def command(
    *, checkpoint: Path, out: Path, force: bool, trt: bool, precisions: tuple[str, ...], min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...], max_shapes: tuple[str, ...], profiles: tuple[str, ...], workspace: str,
    gpu: str | None, targets: tuple[str, ...], timing_cache: str | None, builder: str, int8: bool, beside_teacher: bool,
    **values: Any,
) -> Result:  # fmt: skip
    gpu, values["target_lang"] = _split_targets(targets, gpu, values["target_lang"])
    workspace = workspace_of_pools(workspace)
    profiles += profiles_of_shapes(min_shapes, opt_shapes, max_shapes)
    if not trt and (precisions or profiles or timing_cache or gpu or builder != "auto"):
        raise UsageError(
            "--precision, --minShapes, --optShapes, --maxShapes, --timingCacheFile, --builder and --gpu are for engines",
            "add --trt",
        )
    from deploykit.graphs.export_options import ExportOptions
    from deploykit.quantization.tables import render
    from deploykit.stages.export import export

    engines = EngineOptions(precisions, profiles, workspace, gpu or "portable", timing_cache, builder) if trt else None
    options = ExportOptions(int8=int8, trt=engines, **with_calibration(values))
    done = export(checkpoint, out, options, force=force, say=say)
    metrics = done.manifest.metrics
    sizes = {
        n: r.bytes
        for n, r in done.manifest.files.items()
        if n.endswith((".onnx", ".onnx_data", ".bin", ".safetensors", ".engine", ".gguf"))
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
    if beside_teacher and (options.int8 or options.int4):
        from deploykit.bench import beside_teacher as beside

        if (measured := beside.beside_teacher(checkpoint, out, say)) is not None:
            record["teacher"] = beside.figures(measured)
            text += ["", beside.render(record["teacher"])]
    return record, "\n".join(text)


def _split_targets(targets: tuple[str, ...], gpu: str | None, language: str | None) -> tuple[str | None, str | None]:
    """Return the GPU and the language, each from its own option or from --target, the earlier name of both."""
    gpus = [target for target in targets if re.fullmatch(GPU, target)] + ([gpu] if gpu else [])
    languages = [target for target in targets if target not in gpus] + ([language] if language else [])
    if max(len(gpus), len(languages)) > 1:
        raise UsageError(
            f"several GPUs are given: {', '.join(gpus)}"
            if len(gpus) > 1
            else f"several target languages are given: {', '.join(languages)}",
            "give --target-lang once, and --gpu once",
        )
    return next(iter(gpus), None), next(iter(languages), None)
