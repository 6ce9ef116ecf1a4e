"""Presets of translation models to train from scratch: Marian's architecture in three sizes, with training options.

The architecture is opus-mt's (Tiedemann and Thottingal, EAMT 2020): post-norm, swish, fixed sinusoidal positions, one
embedding for source, target and output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Sizes of a MarianMT model; ``training`` has the option defaults that differ from fine-tuning's."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn: int
    training: Mapping[str, Any] = field(default_factory=dict)


_FROM_NOTHING: Mapping[str, Any] = {
    "mixed_precision": "auto",
    "weight_decay": 0.0,
    "dropout": 0.1,
    "label_smoothing_factor": 0.1,
    "learning_rate": 2e-3,
}

PRESETS: Mapping[str, Preset] = {
    "marian-tiny": Preset(64, 2, 2, 4, 128, {**_FROM_NOTHING, "vocabulary": 1000, "batch_tokens": 512}),
    # Chosen by trial to learn the most in some minutes on two cores (27,000 software strings, English to French, 11
    # minutes of CPU time: BLEU 37 on held-out ones). No dropout: so few epochs do not overfit.
    "marian-small": Preset(
        128, 3, 3, 4, 512, {**_FROM_NOTHING, "vocabulary": 3000, "batch_tokens": 1024, "num_train_epochs": 8.0, "dropout": 0.0}
    ),
    # The shape of Helsinki-NLP/opus-mt-en-fr and most of its siblings.
    "marian-base": Preset(
        512, 6, 6, 8, 2048,
        {**_FROM_NOTHING, "vocabulary": 32000, "batch_tokens": 4096, "num_train_epochs": 20.0, "learning_rate": 5e-4,
         "lr_scheduler_type": "inverse_sqrt", "num_beams": 4},
    ),
}  # fmt: skip
