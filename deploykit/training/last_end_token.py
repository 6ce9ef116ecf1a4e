"""Make classifiers of BART's and T5's kind, whose head reads a text's last end token, accept any texts in one batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import Seq2SeqSequenceClassifierOutput


def _forward(
    self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
) -> Seq2SeqSequenceClassifierOutput:
    """Classify as transformers does (modeling_bart.py, modeling_umt5.py) with one end token a row."""
    if hasattr(self, "_shift_right"):
        options["decoder_input_ids"] = self._shift_right(input_ids)
    hidden = self.base_model(input_ids, attention_mask=attention_mask, **options)[0]
    ends = input_ids.eq(self.config.eos_token_id)
    if not torch.jit.is_tracing() and not ends.any(dim=1).all():
        raise ValueError("Each example must contain at least one <eos> token.")
    places = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device)
    last = (places * ends).argmax(dim=1)
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    return Seq2SeqSequenceClassifierOutput(logits=self.classification_head(hidden[rows, last]))


def read_last_end(model: Any) -> Any:
    """Return ``model`` with a forward pass that finds the last end token of each row; another model unchanged.

    transformers selects all end tokens of a batch and distributes them evenly. A text that contains an end token ("</s>")
    then fails the batch, or moves other rows' tokens, in an exported graph silently.
    """
    kind = type(model)
    if model.config.is_encoder_decoder and hasattr(model, "classification_head") and kind.forward is not _forward:
        # Of the class, not of the object: torch's DataParallel copies the object's attributes.
        model.__class__ = type(kind.__name__, (kind,), {"forward": _forward, "__module__": kind.__module__})
    return model
