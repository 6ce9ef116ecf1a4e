from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    ENCODING,
    FORCE,
    METHODS,
    OUTPUT_DIR,
    Result,
    deploykit_command,
    option,
    say,
)
from deploykit.errors import UsageError
from deploykit.stages.finetune_options import OPTIONS, make_options, read_toml
from deploykit.tasks.registry import DEFAULT, task_of
from deploykit.tasks.translation.presets import PRESETS
from deploykit.training.options import RENAMED, flag

_SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"]


def _load_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        try:
            ctx.default_map = read_toml(path)
        except UsageError as error:
            raise click.UsageError(str(error), ctx) from error


def _option(name: str, **attributes: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """An option that is None where it is not given; --help shows the defaults of the dataclasses that have it."""
    field = name.lstrip("-").replace("-", "_")
    owners = {task: kind for task, kind in OPTIONS.items() if field in kind.__dataclass_fields__}
    defaults = {task: getattr(kind, field) for task, kind in owners.items()}
    shown = {task: str(d) for task, d in defaults.items() if d not in (None, (), "", " ") and d is not False}
    words = [f"[{', '.join(owners)}]"] if len(owners) == 1 else []
    words.append(attributes.pop("help", ""))
    if len(set(shown.values())) > 1:
        shown = {task: f"{default} ({task})" for task, default in shown.items()}
    if shown:
        words.append(f" [default: {', '.join(dict.fromkeys(shown.values()))}]")
    earlier = [flag(old) for old, new in RENAMED.items() if new == field]
    return option(name, default=None, aliases=earlier, help=" ".join(word for word in words if word), **attributes)


def _other_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Declare an option for every field of the tasks' options that has none yet: those of another package's task.

    A field's metadata may have its ``help``.
    """
    declared = {parameter.name for parameter in getattr(function, "__click_params__", ())}
    for kind in OPTIONS.values():
        for field in dataclasses.fields(kind):
            if field.name in declared:
                continue
            declared.add(field.name)
            attributes: dict[str, Any] = {"help": field.metadata.get("help", "")}
            if isinstance(field.default, bool):
                attributes["is_flag"] = True
            elif isinstance(field.default, tuple):
                attributes["multiple"] = True
            elif isinstance(field.default, int | float):
                attributes["type"] = type(field.default)
            function = _option(flag(field.name), **attributes)(function)
    return function


@deploykit_command(
    help="Fine-tune TARGET, the folder of a Hugging Face checkpoint or a hub id, on labelled text or on translations."
)
@_other_options
@click.argument("model", metavar="[TARGET]", required=False)
@click.option("--model", "earlier_model", hidden=True)
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_load_config,
              help="TOML file of these options; the command line wins.")  # fmt: skip
@click.option("--task", type=click.Choice(list(OPTIONS)), default=DEFAULT, show_default=True)
@_option("--from-config", type=click.Choice(list(PRESETS)), help="Train a new model of this size, in place of TARGET.")
@_option("--train", help="csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also TMX, .po, .mo, two "
         "text files as a.en,a.fr; for questions SQuAD's JSON. With --qat, by default the rows of the run that TARGET "
         "is.")  # fmt: skip
@_option("--validation", help="Rows to choose the best step by (default: split off --train).")
@_option("--test", help="Rows to measure the result on (default: split off --train).")
@OUTPUT_DIR
@_option("--text-column", multiple=True, help="Repeat for several; joined in this order (default: detected).")
@_option("--label-column", help="(default: detected)")
@_option("--text-separator", help="Between several text columns.")
@_option("--multi-label", is_flag=True, help="Any number of labels a row: a list, or names with | between them.")
@_option(
    "--labels",
    help="All labels, with commas between them, in the order of the model's outputs (default: those of the rows).",
)
@_option("--label-separator", help="Between the labels of a row with --multi-label (default: |).")
@_option("--source-lang", help="Language translated from, as the checkpoint names it: en, eng_Latn.")
@_option("--target-lang", help="Language translated into.")
@_option("--source-column", help="(default: detected)")
@_option("--target-column", help="(default: detected)")
@_option(
    "--vocabulary", type=int, help="Pieces to make with --from-config, fewer of little text (default: the preset's)."
)
@ENCODING
@_option("--validation-fraction", type=float, help="Of the rows, when there is no --validation.")
@_option("--test-fraction", type=float, help="Of the rows, when there is no --test.")
@_option("--held-out-rows", type=int, help="Split off no more than this for validation, and for test.")
@_option("--max-train-samples", type=int, help="Use this many training rows; 0: all.")
@_option("--max-length", type=int, help="In tokens; longer texts are cut or read in windows, longer pairs left out. 0: "
         "128, or what the model takes where that is less.")  # fmt: skip
@_option("--doc-stride", type=int, help="Tokens of a context that neighbouring windows share.")
@_option("--max-answer-length", type=int, help="Longest answer, in tokens.")
@_option("--whole-words", type=click.Choice(["auto", "yes", "no"]),
         help="Extend answers to whole words; auto: if that is better on the validation rows.")  # fmt: skip
@_option("--num-train-epochs", type=float)
@_option("--max-steps", type=int, help="Optimizer steps; overrides --num-train-epochs; 0: off.")
@_option("--per-device-train-batch-size", type=int)
@_option("--batch-tokens", type=int, help="Most padded tokens of a batch, on its longer side.")
@_option("--gradient-accumulation-steps", type=int, help="Batches per optimizer step.")
@_option("--learning-rate", type=float)
@_option("--optimizer", type=click.Choice(["adamw", "sgd"]))
@_option("--lr-scheduler-type", type=click.Choice(_SCHEDULES))
@_option("--warmup-ratio", type=float, help="Share of the steps.")
@_option("--weight-decay", type=float)
@_option("--max-grad-norm", type=float, help="Clip gradients; 0: off.")
@_option("--dropout", type=float, help="(default: the checkpoint's own; 0.1 with --from-config)")
@_option("--label-smoothing-factor", type=float)
@_option("--class-weights", type=click.Choice(["none", "balanced"]))
@_option("--early-stopping-patience", type=int, help="Evaluations without improvement to stop after; 0: off.")
@_option("--eval-steps", type=int, help="Evaluate and save every so many steps; 0: by epoch.")
@_option("--eval-rows", type=int, help="Most validation rows that an evaluation translates.")
@_option("--num-beams", type=int, help="Beam size to translate with (default: the checkpoint's own).")
@_option(
    "--mixed-precision", type=click.Choice(["no", "bf16", "fp16", "auto"]), help="auto: bf16 where the machine has it."
)
@_option("--lora-r", type=int, help="Train a LoRA adapter of this rank, merged at export; 0: all weights.")
@_option("--lora-alpha", type=int)
@_option("--qat", is_flag=True, help="Go on training a fine-tuned checkpoint with its linear layers rounded to INT8: for "
         "`export --int8` where that loses too much without.")  # fmt: skip
@_option("--qat-method", type=METHODS,
         help="How the ranges are calibrated that --qat begins with.")  # fmt: skip
@_option("--seed", type=int, help="Seed for splits, shuffling and new weights.")
@click.option("--restart", is_flag=True, help="Begin anew instead of continuing a killed run.")
@FORCE
def command(
    *, out: Path, force: bool, restart: bool, model: str | None, earlier_model: str | None, **values: Any
) -> Result:
    if model is not None and earlier_model is not None:
        raise UsageError(f"two checkpoints are given: {model} and {earlier_model}", "name one")
    given = {**values, "model": model if earlier_model is None else earlier_model}
    options = make_options({name: value for name, value in given.items() if value not in (None, ())})

    from deploykit.stages.finetune import finetune

    done = finetune(options, out, force=force, restart=restart, say=say)
    metrics = done.manifest.metrics
    held_out = "test" if "test" in metrics else "validation"
    own, text = task_of(done.manifest.task).result(done.manifest.task, metrics, held_out)
    record = {
        "out": str(out),
        "reused": done.reused,
        "digest": done.manifest.digest,
        **own,
        "rows": metrics["rows"],
        "cleaning": metrics["cleaning"],
        "metrics": metrics[held_out],
    }
    head = f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}"
    return record, f"{head}\non {metrics['rows'][held_out]:,} {held_out} rows:\n{text}"
