"""Choose learning rate, epochs, batch, warm-up and length of a classifier's training from its model and rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deploykit.training.recipe import ChosenValue, Recipe

Kind = Literal["encoder", "encoder-decoder", "decoder"]

_RATE_TIMES_HIDDEN = {"encoder": 0.04, "encoder-decoder": 0.04, "decoder": 0.02}
_RATES = (1e-5, 5e-4)
_MANY_EPOCHS = 10
_MANY_EPOCHS_RATE = 2 / 3
"""Few rows need more epochs at a lower rate (Mosbach et al., On the Stability of Fine-tuning BERT, ICLR 2021)."""
_ADAPTER_RATE = 10
"""LoRA's adapters start at 0, and learn at ten times the rate of all weights (Schulman et al., LoRA Without Regret, 2025)."""
_QAT_RATE = 0.5
_STEPS, _EPOCHS = 300, (3, 20)
_MANY_ROWS, _VERY_MANY_ROWS = 4000, 30_000
_BATCH, _LARGE_BATCH = 16, 32
_WARMUP = 0.1
_QUANTILE, _LENGTHS, _STEP = 0.99, (128, 512), 8


@dataclass(frozen=True)
class Facts:
    """The facts that a recipe depends on: ``rows`` to train on, the model's ``hidden`` size, the longest input that it takes
    (``limit``), and the lengths of training texts in tokens. ``adapter``: LoRA; ``rounded``: quantization-aware training;
    ``processes`` share a batch."""

    kind: Kind
    hidden: int
    limit: int
    rows: int
    lengths: Sequence[int]
    adapter: bool = False
    rounded: bool = False
    processes: int = 1


def choose(facts: Facts, *, batch: int = 0, accumulation: int = 1, epochs: float = 0.0, max_steps: int = 0) -> Recipe:
    """Return a value and its reason for each option of the recipe; ``batch``, ``epochs`` and ``max_steps`` are those that the
    user gave, or 0."""
    length = _length(facts)
    size = _batch(facts, length.value)
    steps = max(1, math.ceil(facts.rows / ((batch or size.value) * facts.processes * accumulation)))
    chosen_epochs = _epochs(facts, steps)
    return {
        "learning_rate": _rate(facts, max_steps / steps or epochs or chosen_epochs.value),
        "num_train_epochs": chosen_epochs,
        "per_device_train_batch_size": size,
        "warmup_ratio": ChosenValue(_WARMUP, "the share of the steps in which the new head settles"),
        "max_length": length,
    }


def kind_of(config: Any) -> Kind:
    """Return the kind of a model from its configuration: a decoder if transformers has a causal but no masked language model of
    its type."""
    from transformers.models.auto import modeling_auto as known

    if config.is_encoder_decoder:
        return "encoder-decoder"
    return (
        "decoder"
        if config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        else "encoder"
    )


def _rate(facts: Facts, epochs: float) -> ChosenValue:
    base = _RATE_TIMES_HIDDEN[facts.kind]
    low, high = _RATES
    exact = base / facts.hidden
    reason = f"{base:g} / hidden size {facts.hidden} of an {facts.kind}".replace("an decoder", "a decoder")
    if epochs > _MANY_EPOCHS:
        exact, reason = exact * _MANY_EPOCHS_RATE, f"{reason}, times 2/3 for more than {_MANY_EPOCHS} epochs"
    rate = min(max(exact, low), high)
    if rate != exact:
        reason += f", between {low:g} and {high:g}"
    if facts.adapter:
        rate, reason = rate * _ADAPTER_RATE, f"{reason}; times {_ADAPTER_RATE} for an adapter"
    if facts.rounded:
        rate, reason = rate * _QAT_RATE, f"{reason}; times {_QAT_RATE:g} with --qat"
    return ChosenValue(float(f"{rate:.2g}"), reason)


def _epochs(facts: Facts, steps: int) -> ChosenValue:
    low, high = _EPOCHS
    if facts.rounded:
        return ChosenValue(1.0, "--qat continues from a trained model")
    if facts.rows > _VERY_MANY_ROWS:
        return ChosenValue(2.0, f"{facts.rows:,} rows, more than {_VERY_MANY_ROWS:,}")
    epochs = min(max(math.ceil(_STEPS / steps), low), high)
    reason = f"{facts.rows:,} rows are {steps:,} step{'s' * (steps > 1)} an epoch: at least {_STEPS} steps, {low} to {high} epochs"
    return ChosenValue(float(epochs), reason)


def _batch(facts: Facts, length: int) -> ChosenValue:
    whole = _whole_batch(facts, length)
    if facts.processes == 1:
        return whole
    return ChosenValue(
        math.ceil(whole.value / facts.processes), f"{whole.value} of {facts.processes} processes: {whole.reason}"
    )


def _whole_batch(facts: Facts, length: int) -> ChosenValue:
    if facts.rows < _MANY_ROWS:
        return ChosenValue(_BATCH, f"{facts.rows:,} rows, fewer than {_MANY_ROWS:,}: more steps")
    if length > _LENGTHS[0]:
        return ChosenValue(_BATCH, f"texts of more than {_LENGTHS[0]} tokens: less memory")
    return ChosenValue(_LARGE_BATCH, f"{facts.rows:,} rows, {_MANY_ROWS:,} or more")


def _length(facts: Facts) -> ChosenValue:
    low, high = _LENGTHS
    covered = int(np.quantile(facts.lengths, _QUANTILE, method="inverted_cdf"))
    rounded = _STEP * math.ceil(covered / _STEP)
    length = min(max(rounded, low), high, facts.limit)
    reason = f"{_QUANTILE:.0%} of the texts have at most {covered:,} tokens".replace("99%", "99 %")
    if length == facts.limit:
        reason += "; the model's limit"
    elif length == low:
        reason += f"; {low} at least: short texts are not padded to this length"
    elif length < rounded:
        reason += f"; {high} at most: longer texts take too much memory for their use"
    return ChosenValue(length, reason)
