"""Learn the probabilities that a teacher gives to each supervised token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from deploykit.errors import UsageError
from deploykit.tasks.text_generation.checkpoint import load_base_config, load_base_tokenizer
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.packing import IGNORED
from deploykit.training.losses import in_parts, soft_targets
from deploykit.training.source import check_source


class Teacher:
    """A checkpoint of a language model. ``share`` is the teacher's part of the loss; the tokens have the other part (Hinton et al., 2015)."""

    def __init__(self, model: Any, share: float, temperature: float) -> None:
        self.model = model.requires_grad_(False)
        self._share, self._temperature = share, temperature

    def loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the summed loss of logits, float [rows x positions, vocabulary]: the cross-entropy of ``targets``, and the
        Kullback-Leibler divergence from the teacher at the temperature, times its square."""
        temperature = self._temperature
        self.model.to(logits.device)
        with torch.no_grad():
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state[:, positions].flatten(0, 1)
            states = states.repeat(len(logits) // max(1, len(states)), 1)  # R-Drop passes each row twice

        def loss_of(ours: torch.Tensor, own: slice) -> torch.Tensor:
            known = targets[own] != IGNORED
            tokens = functional.cross_entropy(ours, targets[own], ignore_index=IGNORED, reduction="sum")
            with torch.no_grad():
                theirs = self._logits(states[own])
            # Beyond the tokenizer's tokens a model may have more embeddings than another.
            most = min(ours.shape[-1], theirs.shape[-1])
            taught = soft_targets(ours[known, :most], theirs[known, :most], temperature)
            return (1 - self._share) * tokens + self._share * taught

        return in_parts(logits, loss_of)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(states).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()


def check_teacher(teacher: str, tokenizer: Any, facts: TextGeneration, max_length: int) -> None:
    """Raise an error for a teacher that is not a checkpoint, or whose tokens differ from those of ``tokenizer``."""
    path = Path(teacher)
    if path.is_dir() and any(path.glob("*.onnx")):
        raise UsageError(
            f"--teacher {teacher} is an export, but the teacher of a language model must return probabilities of all tokens",
            "give its checkpoint",
        )
    check_source(teacher, facts.name)
    config, _ = load_base_config(teacher)
    if load_base_tokenizer(teacher).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"--teacher {teacher} has another vocabulary than the student, but is compared token by token",
            "give a teacher of the same family, fine-tuned with the same --chat-template",
        )
    limit = getattr(config, "max_position_embeddings", None) or max_length
    if limit < max_length:
        raise UsageError(
            f"--teacher {teacher} reads {limit:,} tokens, and the student {max_length:,}", f"give --max-length {limit}"
        )
