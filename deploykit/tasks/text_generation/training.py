"""The training stage of language models: dialogs and texts in, a fine-tuned checkpoint out.

transformers' Trainer runs the steps; what is ours is which tokens count. trl's SFTTrainer, which builds on the same
class, is not used: its tokenization, masks, packing and loss are the parts that this module replaces.
"""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import Trainer

from deploykit.errors import DataError, ExportError, UsageError
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.chat_template import read_template
from deploykit.tasks.text_generation.checkpoint import (
    TorchGenerator,
    chat_tokenizer,
    checkpoint_facts,
    load_base,
    load_base_config,
    load_base_tokenizer,
    set_template,
)
from deploykit.tasks.text_generation.clean_rows import CleaningReport, clean_rows, drop_leaks, show_row, split_rows
from deploykit.tasks.text_generation.encode import EncodedRow, fit
from deploykit.tasks.text_generation.evaluate import Asked, ask, evaluate, room_for
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.options import DEFAULT_LENGTH, TextGenerationOptions
from deploykit.tasks.text_generation.packing import IGNORED, EncodedRows, TokenBatches, pack, pad
from deploykit.tasks.text_generation.rows import Columns, RawRow, Row, load_rows
from deploykit.training import trainer
from deploykit.training.rows import Rows, Say
from deploykit.training.trainer import Trained

_SAMPLES = 5
_MERGE_DIFFERENCE = 1e-3
"""Of logits, relative to their largest: what merging an adapter in fp32 may change."""


class TextGenerationStage:
    """One run, from the checks that need no rows to the measured model."""

    def __init__(self, options: TextGenerationOptions) -> None:
        self._options = options
        config, generation = load_base_config(options.origin)
        self._hf_tokenizer = load_base_tokenizer(options.origin)
        self._added = []
        if options.chat_template is not None:
            template = read_template(options.chat_template)
            self._added = set_template(self._hf_tokenizer, template, self._eos(), needed=False)
        if self._added and options.lora_r:
            raise UsageError(
                f"the chat template adds tokens ({', '.join(self._added)}), whose embeddings a LoRA adapter does not train",
                "train all weights (--lora-r 0), or give --chat-template alpaca",
            )
        self._facts = checkpoint_facts(config, generation, self._hf_tokenizer)
        self._tokenizer = chat_tokenizer(self._hf_tokenizer, self._facts.eos_token_ids)
        self._max_length = options.max_length or min(DEFAULT_LENGTH, self._facts.max_length)
        if self._max_length > self._facts.max_length:
            raise UsageError(
                f"--max-length is {self._max_length}, but {options.origin} takes at most {self._facts.max_length} tokens",
                f"give --max-length {self._facts.max_length} or less",
            )

    def load(self, source: str, split: str, columns: Columns | None) -> tuple[list[RawRow], Columns]:
        options = self._options
        raw, found = load_rows(
            source, prompt_column=options.prompt_column, completion_column=options.completion_column, prefer=columns,
            reading=options, split=split,
        )  # fmt: skip
        # An error that is the checkpoint's or the template's must not pass as one of the rows.
        dialogs = any(item.row.messages for item in raw)
        set_template(self._hf_tokenizer, None, self._eos(), needed=dialogs)
        return raw, found

    def clean(self, raw: Sequence[RawRow]) -> tuple[list[Row], CleaningReport]:
        options = self._options
        return clean_rows(
            raw, self._tokenizer, max_length=self._max_length, on_long=options.long_rows, loss_on=options.supervised
        )

    def check(self, splits: Mapping[str, Sequence[Row]]) -> None:
        if not splits["train"]:
            raise DataError(f"{self._options.train}: no usable rows", "see the counts above for why they were dropped")

    def drop_leaks(self, train: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], int]:
        return drop_leaks(train, held_out)

    def take(self, rows: Sequence[Row], count: int) -> list[Row]:
        return random.Random(self._options.seed).sample(list(rows), count)

    def split(self, rows: Sequence[Row], *, validation: float, test: float) -> tuple[list[Row], list[Row], list[Row]]:
        most = self._options.held_out_rows / len(rows)
        return split_rows(rows, validation=min(validation, most), test=min(test, most), seed=self._options.seed)

    def train(self, rows: Rows[Row, Columns], work: Path, say: Say) -> Trained:
        options = self._options
        columns = rows.columns
        say(f"format: {columns.told()}")
        train_set = self._encoded(rows.splits["train"])
        for row in train_set[: options.show_rows]:
            say(f"a row as the model reads it, supervised tokens in ⟦ ⟧:\n{show_row(self._tokenizer, row)}")
        if rewritten := sum(row.rewritten for row in train_set):
            say(f"{rewritten:,} answers of earlier turns are not supervised: the chat template rewrites them later on")
        model, tokenizer = load_base(options.origin)
        self._fit_vocabulary(model)
        tokenizer = self._hf_tokenizer
        facts = checkpoint_facts(
            model.config, model.generation_config, tokenizer, (columns.format, columns.prompt, columns.completion)
        )
        model.generation_config.eos_token_id = list(facts.eos_token_ids)
        model.generation_config.pad_token_id = facts.pad_token_id
        generator = TorchGenerator(model, tokenizer, facts)
        shown = rows.held_out
        asked = {
            name: ask(self._tokenizer, rows.splits[name], self._facts.max_length)[0] for name in ("validation", "test")
        }
        if shown and not asked[shown].rows:
            raise DataError(
                f"no {shown} row fits the model's context of {self._facts.max_length:,} tokens",
                "give other held-out rows",
            )
        before = self._measured(generator, asked[shown], work / "before.json", say) if shown else None
        validation = self._encoded(rows.splits["validation"])
        if not train_set or (rows.splits["validation"] and not validation):
            raise DataError("no row with a supervised token is left to train or to validate on", "raise --max-length")
        say(
            f"training on {len(train_set):,} rows, {sum(len(row.ids) for row in train_set):,} tokens an epoch, "
            f"{sum(int(row.supervised.sum()) for row in train_set):,} supervised; validating on {len(validation):,}"
        )
        model = _train(model, train_set, validation, facts, options, work, say)
        generator = TorchGenerator(model, tokenizer, facts)
        say("measuring on the held-out rows")
        metrics: dict[str, Any] = {}
        answers: dict[str, list[str]] = {}
        for name in ("validation", "test"):
            if asked[name].rows:
                metrics[name], answers[name] = self._evaluated(generator, asked[name])
        metrics["samples"] = []
        if before is not None:
            metrics["before"] = {shown: before["metrics"]}
            metrics["samples"] = _samples(asked[shown].some(options.eval_rows), answers[shown], before["answers"])
        return Trained(facts, model, tokenizer, metrics)

    def _eos(self) -> list[int]:
        return [] if self._hf_tokenizer.eos_token_id is None else [self._hf_tokenizer.eos_token_id]

    def _encoded(self, rows: Sequence[Row]) -> list[EncodedRow]:
        options = self._options
        encoded = (self._tokenizer.encode_row(row, options.supervised) for row in rows)
        return [part for row in encoded for part in fit(row, self._max_length, options.long_rows)]

    def _fit_vocabulary(self, model: Any) -> None:
        """Make room for the tokens that the chat template added: new rows are drawn about the mean of the others."""
        if self._added and len(self._hf_tokenizer) > model.get_input_embeddings().weight.shape[0]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.resize_token_embeddings(len(self._hf_tokenizer), mean_resizing=True)

    def _evaluated(self, generator: TorchGenerator, asked: Asked) -> tuple[dict[str, Any], list[str]]:
        sampling = Sampling(max_new_tokens=room_for(self._tokenizer, asked))
        return evaluate(generator, asked, sampling, answered=self._options.eval_rows)

    def _measured(self, generator: TorchGenerator, asked: Asked, kept: Path, say: Say) -> dict[str, Any]:
        """What the checkpoint is before training; a run taken up again finds it in ``kept``."""
        if kept.is_file():
            record: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return record
        say("measuring the checkpoint as it came")
        metrics, answers = self._evaluated(generator, asked)
        record = {"metrics": metrics, "answers": answers}
        kept.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        return record


class SftTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the sum over supervised tokens divided by their number in all micro-batches of a step.

    The head computes logits of positions alone that predict a supervised token.
    """

    def __init__(self, *, batches: TokenBatches, validation: DataLoader[Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = (
            True  # Trainer then counts the labels of all micro-batches, and divides by none
        )
        self._batches = batches
        self._validation = validation
        self._seen_tokens, self._since = 0, time.monotonic()

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._seen_tokens += int(inputs["input_ids"].numel())
        total, count = supervised_loss(model, inputs)
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
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = self._seen_tokens / max(now - self._since, 1e-9)
            self._seen_tokens, self._since = 0, now
        super().log(logs, *arguments, **named)


def supervised_loss(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the summed loss of all supervised tokens, and how many they are.

    ``inputs`` is a batch of ``pack`` or ``pad``.
    """
    labels = inputs["labels"][:, 1:]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    positions = (labels != IGNORED).any(0).nonzero()[:, 0]
    logits = model(**rest, logits_to_keep=positions, use_cache=False).logits
    targets = labels[:, positions]
    loss = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((targets != IGNORED).sum())


def _train(
    model: Any, rows: Sequence[EncodedRow], validation: Sequence[EncodedRow], facts: TextGeneration,
    options: TextGenerationOptions, work: Path, say: Say,
) -> Any:  # fmt: skip
    """Return the model as it was at the lowest validation loss, if there are validation rows, an adapter merged into it."""
    attention = model.config._attn_implementation
    if type(model)._supports_sdpa:
        model.set_attn_implementation("sdpa")  # keeps no scores for the backward pass
    collate = pack if options.packing else partial(pad, pad_token_id=facts.pad_token_id)
    batches = TokenBatches(
        [len(row.ids) for row in rows], options.batch_tokens, packed=options.packing, seed=options.seed
    )
    held_out = TokenBatches(
        [len(row.ids) for row in validation], options.batch_tokens, packed=options.packing, seed=None
    )
    trained = model
    if options.lora_r:
        trained = _with_adapter(model, options)
    if options.gradient_checkpointing:
        # Its name before transformers 5.23 is deprecated.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.enable_input_require_grads()
    arguments = trainer.arguments(
        options, len(batches), work / "trainer", neftune_noise_alpha=options.neftune_noise_alpha or None
    )
    result = trainer.run(
        SftTrainer(
            model=trained,
            args=arguments,
            batches=batches,
            validation=DataLoader(EncodedRows(validation), batch_sampler=held_out, collate_fn=collate),
            train_dataset=EncodedRows(rows),
            eval_dataset=EncodedRows(validation),
            data_collator=collate,
            callbacks=trainer.callbacks(options, work / "tensorboard", say),
        )
    )
    if options.lora_r:
        result = _merged(result, rows[0], say)
    result.set_attn_implementation(attention)
    return result


def _with_adapter(model: Any, options: TextGenerationOptions) -> Any:
    names = [name.strip() for name in options.lora_target_modules.split(",")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trainer.with_adapter(
                model, options, "CAUSAL_LM", lora_dropout=options.lora_dropout, use_dora=options.use_dora,
                use_rslora=options.use_rslora, target_modules="all-linear" if names == ["all-linear"] else names,
            )  # fmt: skip
    except ValueError as error:
        raise UsageError(
            f"--lora-target-modules {options.lora_target_modules}: {error}", "give all-linear, or names of layers"
        ) from error


def _merged(adapted: Any, row: EncodedRow, say: Say) -> Any:
    """The weights with the adapter added to them. Raises ExportError when they compute something else than both did."""
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


def _samples(asked: Asked, after: Sequence[str], before: Sequence[str]) -> list[dict[str, str]]:
    """Some held-out rows, evenly over their order, with what the model answers."""
    rows = [row for row in asked.rows if row.text is None]
    shown = range(0, len(rows), max(1, len(rows) // _SAMPLES))[:_SAMPLES]
    return [
        {"prompt": rows[i].prompt, "reference": rows[i].answer, "before": before[i], "answer": after[i]} for i in shown
    ]
