"""Families of encoder-decoder checkpoints, one small file each, which reads the family's weights.

To add a family, write a module here with ``architecture(model, weights)``, and add it to ``FAMILIES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from deploykit.errors import ExportError
from deploykit.graphs.architecture import Architecture, Weights, pad_heads

# model_type of a Hugging Face config -> module in this package
FAMILIES: Mapping[str, str] = {
    "bart": "mbart",
    "m2m_100": "m2m100",
    "marian": "marian",
    "mbart": "mbart",
    "mt5": "t5",
    "t5": "t5",
}


def read_architecture(model: Any) -> Architecture:
    """Read the architecture and weights of ``model``, a Hugging Face encoder-decoder on the CPU.

    Raises ExportError for a family that is not supported, and for an encoder or a decoder without layers.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ExportError(
            f"translation models of type {kind!r} are not supported",
            f"supported types: {', '.join(FAMILIES)}; see the page 'What has been run where' in the docs",
        )
    module = importlib.import_module(f"{__name__}.{FAMILIES[kind]}")
    state = {name: np.asarray(tensor.detach().float().numpy()) for name, tensor in model.state_dict().items()}
    architecture: Architecture = module.architecture(model, Weights(state))
    if not architecture.encoder_layers or not architecture.decoder_layers:
        raise ExportError("the model has no layers in its encoder or its decoder", "give a model with layers in both")
    return pad_heads(architecture)
