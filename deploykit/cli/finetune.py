from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import ENCODING, FORCE, Result, deploykit_command, metrics_text, say
from deploykit.errors import UsageError
from deploykit.finetune.options import FinetuneOptions, read_toml

_DEFAULT = FinetuneOptions(model="", train="")


def _load_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        try:
            ctx.default_map = read_toml(path)
        except UsageError as error:
            raise click.UsageError(str(error), ctx) from error


def _option(name: str, **attributes: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """An option whose default is the dataclass's own, shown in --help."""
    default = getattr(_DEFAULT, name.lstrip("-").split("/")[0].replace("-", "_"))
    return click.option(name, default=default, show_default=default is not None, **attributes)


@deploykit_command(help="Fine-tune a Hugging Face checkpoint on labelled text.")
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_load_config,
              help="TOML file of these options; the command line wins.")  # fmt: skip
@click.option("--task", type=click.Choice(["classification"]), default="classification", show_default=True)
@click.option("--model", required=True, help="Folder of a checkpoint, or a hub id.")
@click.option("--train", required=True, help="Labelled rows: csv, tsv, jsonl, parquet, HF dataset folder or hub id.")
@click.option("--validation", help="Rows to choose the best step by (default: split off --train).")
@click.option("--test", help="Rows to measure the result on (default: split off --train).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the checkpoint to.")
@click.option("--text-column", multiple=True, help="Repeat for several; joined in this order (default: detected).")
@click.option("--label-column", help="(default: detected)")
@_option("--text-separator", help="Between several text columns.")
@click.option("--multi-label", is_flag=True, help="Any number of labels a row, separated by |.")
@ENCODING
@_option("--validation-fraction", type=float, help="Of the rows, when there is no --validation.")
@_option("--test-fraction", type=float, help="Of the rows, when there is no --test.")
@_option("--max-rows", type=int, help="Use this many training rows, stratified; 0: all.")
@_option("--max-length", type=int, help="In tokens; longer texts are cut.")
@_option("--epochs", type=float)
@_option("--max-steps", type=int, help="Optimizer steps; overrides --epochs; 0: off.")
@_option("--batch-size", type=int)
@_option("--accumulation", type=int, help="Batches per optimizer step.")
@_option("--learning-rate", type=float)
@_option("--optimizer", type=click.Choice(["adamw", "sgd"]))
@_option("--schedule", type=click.Choice(["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]))
@_option("--warmup", type=float, help="Share of the steps.")
@_option("--weight-decay", type=float)
@_option("--max-grad-norm", type=float, help="Clip gradients; 0: off.")
@_option("--dropout", type=float, help="Of the encoder and the head (default: the checkpoint's own).")
@_option("--label-smoothing", type=float)
@_option("--class-weights", type=click.Choice(["none", "balanced"]))
@_option("--early-stopping", type=int, help="Evaluations without improvement to stop after; 0: off.")
@_option("--eval-steps", type=int, help="Evaluate and save every so many steps; 0: at least each epoch.")
@_option("--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]))
@_option("--lora-rank", type=int, help="Train a LoRA adapter of this rank, merged at export; 0: all weights.")
@_option("--lora-alpha", type=int)
@_option("--seed", type=int)
@click.option("--restart", is_flag=True, help="Begin anew instead of continuing a killed run.")
@FORCE
def command(*, out: Path, force: bool, restart: bool, **values: Any) -> Result:
    from deploykit.finetune.checkpoint import check_source

    for name in ("model", "train", "validation", "test"):
        # A saved TOML must work from any folder.
        if values[name] and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    options = FinetuneOptions(**{**values, "text_column": tuple(values["text_column"])})
    options.check()
    if options.mixed_precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--mixed-precision fp16 needs a GPU", "use bf16, or leave it out")
    check_source(options.model)

    from deploykit.finetune.classification import finetune

    done = finetune(options, out, force=force, restart=restart, say=say)
    metrics = done.manifest.metrics
    held_out = "test" if "test" in metrics else "validation"
    text = (
        f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}\n"
        f"on {metrics['rows'][held_out]:,} {held_out} rows:\n{metrics_text(metrics[held_out])}"
    )
    record = {
        "out": str(out),
        "reused": done.reused,
        "digest": done.manifest.digest,
        "labels": list(done.manifest.task.labels),
    }
    return {**record, "rows": metrics["rows"], "cleaning": metrics["cleaning"], "metrics": metrics[held_out]}, text
