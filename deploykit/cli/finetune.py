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
    """Declare an option that is None if not given. --help shows the defaults of the dataclasses that have it."""
    field = name.partition("/")[0].lstrip("-").replace("-", "_")
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

    A field's metadata may have its ``help`` and its ``choices``. One that is True by default has a ``--no-`` form too.
    """
    declared = {parameter.name for parameter in getattr(function, "__click_params__", ())}
    for kind in OPTIONS.values():
        for field in dataclasses.fields(kind):
            if field.name in declared:
                continue
            declared.add(field.name)
            attributes: dict[str, Any] = {"help": field.metadata.get("help", "")}
            name = flag(field.name)
            if isinstance(field.default, bool):
                attributes["is_flag"] = True
                name += f"/--no-{name[2:]}" if field.default else ""
            elif "choices" in field.metadata:
                attributes["type"] = click.Choice(field.metadata["choices"])
            elif isinstance(field.default, tuple):
                attributes["multiple"] = True
            elif isinstance(field.default, int | float):
                attributes["type"] = type(field.default)
            function = _option(name, **attributes)(function)
    return function


@deploykit_command(
    help="Fine-tune TARGET, the folder of a Hugging Face checkpoint or a hub id, on labelled text, on translations, or on prompts and answers. For text-generation TARGET may be a .gguf file."
)
@_other_options
@click.argument("model", metavar="[TARGET]", required=False)
@click.option("--model", "earlier_model", hidden=True)
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_load_config,
              help="TOML file of these options; the command line wins.")  # fmt: skip
@click.option("--task", type=click.Choice(list(OPTIONS)), default=DEFAULT, show_default=True)
@_option("--from-config", type=click.Choice(list(PRESETS)), help="Train a new model of this size, in place of TARGET.")
@_option("--train", help="Training rows: csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also TMX, .po, .mo, or "
         "two text files as a.en,a.fr; for questions SQuAD's JSON. Default with --qat: the rows of the run TARGET.")  # fmt: skip
@_option("--validation", help="Rows that the best step is chosen by (default: split off --train).")
@_option("--test", help="Rows that the result is measured on (default: split off --train).")
@OUTPUT_DIR
@_option(
    "--text-column",
    multiple=True,
    help="Text column (default: detected). Two are a pair: the tokenizer reads both, with its separator between.",
)
@_option("--label-column", help="Label column (default: detected).")
@_option("--text-separator", help="Join the text columns into one text, with this between.")
@_option("--multi-label", is_flag=True, help="Allow any number of labels per row: a list, or names separated by |.")
@_option(
    "--labels",
    help="All labels, separated by commas, in the order of the model's outputs (default: those in the rows).",
)
@_option("--label-separator", help="Separator of a row's labels with --multi-label (default: |).")
@_option("--source-lang", help="Source language, as the checkpoint names it: en, eng_Latn.")
@_option("--target-lang", help="Target language.")
@_option("--source-column", help="Source column (default: detected).")
@_option("--target-column", help="Target column (default: detected).")
@_option(
    "--vocabulary",
    type=int,
    help="Vocabulary size with --from-config; smaller if there is little text (default: the preset's).",
)
@ENCODING
@_option("--validation-fraction", type=float, help="Share of the rows for validation, without --validation.")
@_option("--test-fraction", type=float, help="Share of the rows for the test, without --test.")
@_option("--held-out-rows", type=int, help="Maximum rows to split off for validation, and for the test.")
@_option("--max-train-samples", type=int, help="Maximum training rows; 0: all.")
@_option("--max-length", type=int, help="Maximum tokens of a text; longer texts are truncated, or read in windows (question answering), "
         "longer pairs dropped. 0: 128, or the model's limit if that is lower (classification).")  # fmt: skip
@_option("--doc-stride", type=int, help="Number of tokens that neighboring windows of a context share.")
@_option("--max-answer-length", type=int, help="Maximum tokens of an answer.")
@_option("--whole-words", type=click.Choice(["auto", "yes", "no"]),
         help="Extend answers to whole words. auto: if that is better on the validation rows.")  # fmt: skip
@_option("--num-train-epochs", type=float, help="Number of epochs.")
@_option("--max-steps", type=int, help="Optimizer steps; overrides --num-train-epochs; 0: off.")
@_option("--per-device-train-batch-size", type=int, help="Rows of a batch.")
@_option(
    "--batch-tokens",
    type=int,
    help="Maximum tokens of a batch, padding included; pairs are counted on their longer side.",
)
@_option("--gradient-accumulation-steps", type=int, help="Batches per optimizer step.")
@_option("--learning-rate", type=float, help="Peak learning rate.")
@_option("--optimizer", type=click.Choice(["adamw", "sgd"]))
@_option("--lr-scheduler-type", type=click.Choice(_SCHEDULES))
@_option("--warmup-ratio", type=float, help="Share of the steps with a rising learning rate.")
@_option("--weight-decay", type=float)
@_option("--max-grad-norm", type=float, help="Clip gradients; 0: off.")
@_option("--dropout", type=float, help="Dropout (default: the checkpoint's; 0.1 with --from-config).")
@_option("--label-smoothing-factor", type=float)
@_option("--class-weights", type=click.Choice(["none", "balanced"]))
@_option("--early-stopping-patience", type=int, help="Stop after this many evaluations without improvement; 0: off.")
@_option("--eval-steps", type=int, help="Evaluate and save every so many steps; 0: by epoch.")
@_option(
    "--eval-rows",
    type=int,
    help="Maximum validation rows that an evaluation translates; for text-generation, held-out rows to answer before and after training.",
)
@_option("--num-beams", type=int, help="Number of beams for the final translations (default: the checkpoint's).")
@_option(
    "--mixed-precision",
    type=click.Choice(["no", "bf16", "fp16", "auto"]),
    help="Mixed precision. auto: bf16 if the machine supports it.",
)
@_option("--lora-r", type=int, help="Train a LoRA adapter of this rank, merged at export; 0: all weights.")
@_option("--lora-alpha", type=int)
@_option("--qat", is_flag=True, help="Quantization-aware training: continue a fine-tuned checkpoint with its linear layers rounded to INT8, if "
         "`export --int8` loses too much otherwise.")  # fmt: skip
@_option("--qat-method", type=METHODS,
         help="Calibration method of the ranges that --qat starts with.")  # fmt: skip
@_option("--seed", type=int, help="Seed for splits, shuffling and new weights.")
@click.option("--restart", is_flag=True, help="Start over instead of continuing a killed run.")
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
