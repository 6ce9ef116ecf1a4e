from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    ENCODING,
    FORCE,
    METHODS,
    Result,
    deploykit_command,
    say,
)
from deploykit.errors import UsageError
from deploykit.finetune.options import OPTIONS, make_options, read_toml, with_rows_of_run
from deploykit.tasks.registry import DEFAULT, task_of
from deploykit.tasks.translation.presets import PRESETS

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
    return click.option(name, default=None, help=" ".join(word for word in words if word), **attributes)


@deploykit_command(help="Fine-tune a Hugging Face checkpoint on labelled text, translations, or prompts and answers.")
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_load_config,
              help="TOML file of these options; the command line wins.")  # fmt: skip
@click.option("--task", type=click.Choice(list(OPTIONS)), default=DEFAULT, show_default=True)
@_option("--model", help="Folder of a checkpoint, or a hub id; for text-generation also a .gguf file.")
@_option("--from-config", type=click.Choice(list(PRESETS)), help="Train a new model of this size instead.")
@_option("--train", help="csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also TMX, .po, .mo, two "
         "text files as a.en,a.fr. With --qat, by default the rows of the run that --model is.")  # fmt: skip
@_option("--validation", help="Rows to choose the best step by (default: split off --train).")
@_option("--test", help="Rows to measure the result on (default: split off --train).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the checkpoint to.")
@_option("--text-column", multiple=True, help="Repeat for several; joined in this order (default: detected).")
@_option("--label-column", help="(default: detected)")
@_option("--text-separator", help="Between several text columns.")
@_option("--multi-label", is_flag=True, help="Any number of labels a row, separated by |.")
@_option("--source", help="Language translated from, as the checkpoint names it: en, eng_Latn.")
@_option("--target", help="Language translated into.")
@_option("--source-column", help="(default: detected)")
@_option("--target-column", help="(default: detected)")
@_option("--prompt-column", help="(default: detected)")
@_option("--completion-column", help="(default: detected)")
@_option("--chat-template", help="chatml, alpaca or a Jinja file, in place of the checkpoint's own template.")
@_option("--loss-on", type=click.Choice(["completion", "last-turn", "all"]), help="The tokens that are learned: all "
         "answers, the last one, or everything.")  # fmt: skip
@_option("--on-long", type=click.Choice(["drop", "truncate", "split", "error"]), help="A row longer than --max-length.")
@_option("--show-rows", type=int, help="Training rows to print, supervised tokens in green.")
@_option(
    "--vocabulary", type=int, help="Pieces to make with --from-config, fewer of little text (default: the preset's)."
)
@ENCODING
@_option("--validation-fraction", type=float, help="Of the rows, when there is no --validation.")
@_option("--test-fraction", type=float, help="Of the rows, when there is no --test.")
@_option("--held-out-rows", type=int, help="Split off no more than this for validation, and for test.")
@_option("--max-rows", type=int, help="Use this many training rows; 0: all.")
@_option("--max-length", type=int, help="In tokens; longer texts are cut, longer pairs left out.")
@_option("--epochs", type=float)
@_option("--max-steps", type=int, help="Optimizer steps; overrides --epochs; 0: off.")
@_option("--batch-size", type=int)
@_option("--batch-tokens", type=int, help="Most tokens of a batch: padded ones, of translations on the longer side.")
@_option("--packing/--no-packing", help="Rows stand one after another in a batch, without padding.")
@_option("--gradient-checkpointing", is_flag=True, help="Less memory for more time.")
@_option("--accumulation", type=int, help="Batches per optimizer step.")
@_option("--learning-rate", type=float)
@_option("--optimizer", type=click.Choice(["adamw", "sgd"]))
@_option("--schedule", type=click.Choice(_SCHEDULES))
@_option("--warmup", type=float, help="Share of the steps.")
@_option("--weight-decay", type=float)
@_option("--max-grad-norm", type=float, help="Clip gradients; 0: off.")
@_option("--dropout", type=float, help="(default: the checkpoint's own; 0.1 with --from-config)")
@_option("--label-smoothing", type=float)
@_option("--class-weights", type=click.Choice(["none", "balanced"]))
@_option("--early-stopping", type=int, help="Evaluations without improvement to stop after; 0: off.")
@_option("--eval-steps", type=int, help="Evaluate and save every so many steps; 0: by epoch.")
@_option(
    "--eval-rows",
    type=int,
    help="Most held-out rows that are translated at each evaluation; of language models, answered before and after.",
)
@_option("--beam", type=int, help="Beam size to translate with (default: the checkpoint's own).")
@_option(
    "--mixed-precision", type=click.Choice(["no", "bf16", "fp16", "auto"]), help="auto: bf16 where the machine has it."
)
@_option("--lora-rank", type=int, help="Train a LoRA adapter of this rank, merged at export; 0: all weights.")
@_option("--lora-alpha", type=int)
@_option("--lora-dropout", type=float)
@_option("--dora", is_flag=True, help="Adapt directions and magnitudes of weights apart (DoRA).")
@_option("--rslora", is_flag=True, help="Scale an adapter by the root of its rank (rsLoRA).")
@_option("--neftune", type=float, help="Noise on the embeddings while training (NEFTune); 0: off.")
@_option("--lora-target", help="Layers to adapt, joined by commas, or all-linear.")
@_option("--qat", is_flag=True, help="Go on training a fine-tuned --model with its linear layers rounded to INT8: for "
         "`export --int8` where that loses too much without.")  # fmt: skip
@_option("--qat-method", type=METHODS,
         help="How the ranges are calibrated that --qat begins with.")  # fmt: skip
@_option("--seed", type=int)
@click.option("--restart", is_flag=True, help="Begin anew instead of continuing a killed run.")
@FORCE
def command(*, out: Path, force: bool, restart: bool, **values: Any) -> Result:
    from deploykit.training.rows import absolute

    given = {name: value for name, value in values.items() if value not in (None, ())}
    for name in ("model", "train", "validation", "test"):
        # A saved TOML must work from any folder.
        if given.get(name):
            given[name] = absolute(given[name])
    if "text_column" in given:
        given["text_column"] = tuple(given["text_column"])
    options = make_options(with_rows_of_run(given))
    options.check()
    if options.mixed_precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--mixed-precision fp16 needs a GPU", "use bf16, or leave it out")
    if options.model is not None:
        from deploykit.training.source import check_source

        check_source(options.model, options.task)

    from deploykit.finetune.run import finetune

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
