"""Fine-tune on supervised tokens: the loss, the batches, and the records of a run.

transformers' Trainer runs the steps; this module decides which tokens count. trl's SFTTrainer, which builds on the same
class, is not used: its tokenization, masks, packing and loss are the parts that this module replaces.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import Trainer

from deploykit.errors import ExportError
from deploykit.tasks.text_generation import packed_attention
from deploykit.tasks.text_generation.adapter import moved, with_adapter
from deploykit.tasks.text_generation.distill import Teacher
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.four_bit import load_four_bit
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.packing import (
    IGNORED,
    EncodedRows,
    TokenBatches,
    pack,
    pack_sharing,
    pad,
    row_tokens,
)
from deploykit.training import processes, trainer
from deploykit.training.losses import check_dropout, token_divergence
from deploykit.training.regularization import optimizers
from deploykit.training.rows import Say

_SHOWN = 100
_MERGE_DIFFERENCE = 1e-3
"""Largest change of logits by merging an adapter in fp32, relative to the largest logit."""


class SampleAnswers:
    """Answers to some prompts at each evaluation: printed, and kept in ``file`` for a run that is continued."""

    def __init__(self, prompts: Sequence[str], answer: Callable[[Any], Sequence[str]], file: Path, say: Say) -> None:
        self._prompts, self._answer, self._file, self._say = prompts, answer, file, say
        self.by_step: dict[int, Sequence[str]] = {}
        if file.is_file():
            self.by_step = {int(step): found for step, found in json.loads(file.read_text(encoding="utf-8")).items()}

    def ask(self, model: Any, step: int) -> None:
        """Answer with ``model``, which is in eval mode."""
        self.by_step[step] = self._answer(model)
        self._file.write_text(json.dumps(self.by_step, ensure_ascii=False), encoding="utf-8")
        for prompt, answer in zip(self._prompts, self.by_step[step]):
            self._say(f"  {shortened(prompt)} -> {shortened(answer)}")


def shortened(text: str) -> str:
    """Return a text as one line of at most ``_SHOWN`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


class SftTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the sum over supervised tokens divided by their number in all micro-batches of a step.

    The head computes only logits of positions that predict a supervised token.
    """

    def __init__(
        self,
        *,
        batches: TokenBatches,
        validation: DataLoader[Any],
        answers: SampleAnswers | None,
        teacher: Teacher | None,
        r_drop: float,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = (
            True  # Trainer then counts the labels of all micro-batches, and divides by none
        )
        self._batches = batches
        self._validation = validation
        self._answers = answers
        self._teacher = teacher
        self._r_drop = r_drop
        self._seen_tokens, self._since = 0, time.monotonic()

    def get_train_dataloader(self) -> Any:
        return trainer.own_batches(self, self._batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._seen_tokens += row_tokens(inputs)
        total, count = supervised_loss(model, inputs, self._teacher, self._r_drop if model.training else 0.0)
        items = count if num_items_in_batch is None else num_items_in_batch
        loss = total / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss of a validation token, and its exponential; the best evaluation has the lowest loss."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.inference_mode(), self.compute_loss_context_manager():
            for batch in self._validation:
                loss, tokens = supervised_loss(self.model, {k: v.to(self.args.device) for k, v in batch.items()})
                total, count = total + float(loss), count + tokens
        loss = total / max(count, 1)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 50)), "selection": -loss}
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        if self._answers is not None:
            self._answers.ask(self.model, self.state.global_step)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs:
            now = time.monotonic()
            seen = self.accelerator.reduce(torch.tensor(self._seen_tokens, device=self.args.device))
            logs["tokens_per_second"] = int(seen) / max(now - self._since, 1e-9)
            self._seen_tokens, self._since = 0, now
        super().log(logs, *arguments, **named)


def supervised_loss(
    model: Any, inputs: Mapping[str, torch.Tensor], teacher: Teacher | None = None, r_drop: float = 0.0
) -> tuple[torch.Tensor, int]:
    """Return the summed loss of all supervised tokens, with what a teacher adds, and how many they are.

    ``inputs`` is a batch of ``pack`` or ``pad``. With ``r_drop``, the weight of the divergence of two passes with different
    dropout (R-Drop), the loss is their mean.
    """
    labels = inputs["labels"][:, 1:]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    positions = (labels != IGNORED).any(0).nonzero()[:, 0]
    targets = labels[:, positions].flatten()
    known = targets != IGNORED
    passes = 2 if r_drop else 1
    batch = {name: torch.cat([value] * passes) for name, value in rest.items()}
    logits = model(**batch, logits_to_keep=positions, use_cache=False).logits.flatten(0, 1)
    wanted = torch.cat([targets] * passes)
    if teacher is None:
        loss = functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum")
    else:
        loss = teacher.loss(logits, wanted, rest, positions)
    if r_drop:
        loss = loss / 2 + r_drop * token_divergence(logits, known)
    return loss, int(known.sum())


def train(
    model: Any, rows: Sequence[EncodedRow], validation: Sequence[EncodedRow], facts: TextGeneration,
    options: TextGenerationOptions, work: Path, say: Say, answers: SampleAnswers | None = None, teacher: Teacher | None = None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Return the model as it was at the lowest validation loss, an adapter merged into it, and the run's history.

    The history has "steps", with the training loss (nats a token) and the tokens per second up to each, and
    "evaluations", with the validation loss at each; both by "step".
    """
    attention = model.config._attn_implementation
    base = load_four_bit(options.origin, **options.dropout_config(model.config)) if options.load_in_4bit else model
    sft = sft_trainer(base, rows, validation, facts, options, work, say, answers, teacher)
    result = trainer.run(sft)
    if options.load_in_4bit:
        result = moved(result, model)  # weights of 4 bits would be rounded a second time after a merge
    if options.adapts:
        result = _merged(result, rows[0], say)
    result.set_attn_implementation(attention)
    return result, _history(sft.state.log_history, {} if answers is None else answers.by_step)


def sft_trainer(
    model: Any, rows: Sequence[EncodedRow], validation: Sequence[EncodedRow], facts: TextGeneration,
    options: TextGenerationOptions, work: Path, say: Say, answers: SampleAnswers | None = None, teacher: Teacher | None = None,
) -> SftTrainer:  # fmt: skip
    """Return the trainer of ``model``, to which an adapter is added if ``options`` ask for one."""
    read_by = [model] if teacher is None else [model, teacher.model]
    for each in read_by:
        if type(each)._supports_sdpa:
            packed_attention.register()
            by_rows = options.packing and not torch.cuda.is_available()
            # Neither keeps scores for the backward pass.
            each.set_attn_implementation(packed_attention.NAME if by_rows else "sdpa")
    longest = max(len(row.ids) for row in (*rows, *validation))
    collate = _collate(read_by, longest, options, facts)
    batches = TokenBatches(
        [len(row.ids) for row in rows], options.batch_tokens, packed=options.packing, seed=options.seed,
        process=processes.number(), processes=processes.count(),
    )  # fmt: skip
    held_out = TokenBatches(
        [len(row.ids) for row in validation], options.batch_tokens, packed=options.packing, seed=None
    )
    trained = model
    if options.adapts:
        trained = with_adapter(model, options, say)
    if options.r_drop and not options.neftune_noise_alpha:
        check_dropout(trained, "add --attention-dropout 0.1, or --lora-r 8, whose adapter has --lora-dropout")
    if options.gradient_checkpointing:
        # Its name before transformers 5.23 is deprecated.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.enable_input_require_grads()
    arguments = trainer.arguments(
        options, len(batches) * processes.count(), work / "trainer", neftune_noise_alpha=options.neftune_noise_alpha or None,
        # A continued run has already been evaluated there, and early stopping has counted it.
        eval_on_start=bool(validation) and not any((work / "trainer").glob("checkpoint-*")),
    )  # fmt: skip
    return SftTrainer(
        model=trained,
        args=arguments,
        batches=batches,
        validation=DataLoader(EncodedRows(validation), batch_sampler=held_out, collate_fn=collate),
        answers=answers if processes.is_first() else None,
        teacher=teacher,
        r_drop=options.r_drop,
        train_dataset=EncodedRows(rows),
        eval_dataset=EncodedRows(validation),
        data_collator=collate,
        callbacks=trainer.callbacks(options, work / "tensorboard", say),
        optimizers=optimizers(trained, options),
    )


def _collate(
    models: Sequence[Any], longest: int, options: TextGenerationOptions, facts: TextGeneration
) -> Callable[[Sequence[EncodedRow]], dict[str, torch.Tensor]]:
    """Return a function that makes a batch of rows of at most ``longest`` tokens for all ``models``."""
    if not options.packing:
        return partial(pad, pad_token_id=facts.pad_token_id)
    # All layers get one mask, which knows no sliding window.
    windows = [getattr(model.config, "sliding_window", None) for model in models]
    masked = all(type(model)._supports_sdpa for model in models)
    return pack_sharing if masked and all(window is None or longest <= window for window in windows) else pack


def _history(logs: Sequence[Mapping[str, Any]], answers: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    steps = [{name: log[name] for name in ("step", "loss", "tokens_per_second")} for log in logs if "loss" in log]
    losses = {log["step"]: log["eval_loss"] for log in logs if "eval_loss" in log}
    return {
        "steps": steps,
        "evaluations": [{"step": n, "loss": loss, "answers": answers.get(n, [])} for n, loss in losses.items()],
    }


def _merged(adapted: Any, row: EncodedRow, say: Say) -> Any:
    """Return the weights with the adapter merged. Raises ExportError if the merged model computes other logits."""
    ids = torch.from_numpy(row.ids)[None]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload().eval()
        found = merged(input_ids=ids).logits
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _MERGE_DIFFERENCE:
        raise ExportError(
            f"merging the adapter changes logits by {difference:.1e} of the largest, more than {_MERGE_DIFFERENCE}",
            "train without --lora-r, and report this checkpoint",
        )
    say(f"the adapter is merged into the weights: logits differ by at most {difference:.1e} of the largest")
    return merged
