"""Run a Hugging Face model for extractive question answering in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, UsageError, first_line
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.predictor import Answerer, Logits, with_types
from deploykit.tasks.question_answering.windows import PairTokenizer
from deploykit.training.checkpoint import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    max_tokens,
    pad_token_id,
    quiet,
    trained_with_token_types,
)
from deploykit.training.padding import padded

_USUAL_LENGTH, _USUAL_STRIDE = 384, 128
"""Default window length and stride (tokens), as BERT's authors used for SQuAD."""

_LONGFORMER_SEPARATORS = 3
"""Separators of a window of Longformer: two between question and context, and one at the end."""
_TRIED = ("good", "The quick brown fox jumps over the lazy dog, and 3 more words.")
"""Contexts that ``check_model`` asks about."""
_TOLERANCE = 1e-3


class TorchAnswerer(Answerer):
    """A checkpoint run by PyTorch: the reference for every export."""

    def __init__(self, model: Any, tokenizer: Any, task: QuestionAnswering) -> None:
        self.model = model
        self.hub_tokenizer = tokenizer
        if model.config.model_type == "longformer" and not model._forward_pre_hooks:
            model.register_forward_pre_hook(_attend_to_question, with_kwargs=True)
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        super().__init__(task, PairTokenizer(own, task), self.run, DEFAULT_TOKEN_BUDGET)

    @classmethod
    def load(cls, path: Path) -> TorchAnswerer:
        quiet()
        tokenizer, model = load_tokenizer(str(path)), load_model(str(path), QuestionAnswering.name)
        check_vocabulary(model, tokenizer, str(path))
        answerer = cls(model, tokenizer, task_of(path, tokenizer, model))
        if not (path / MANIFEST).exists():
            check_model(answerer, str(path))
        return answerer

    def run(self, inputs: dict[str, NDArray[np.int64]]) -> tuple[Logits, Logits]:
        """Return start and end logits, float32 [windows, tokens]."""
        device = next(self.model.parameters()).device  # a GPU during training on one
        with torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array).to(device) for name, array in inputs.items()})
        start, end = (np.asarray(logits.float().cpu().numpy()) for logits in (output.start_logits, output.end_logits))
        return start, end


def _attend_to_question(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a Longformer its global attention, on all tokens before the first separator, if a text has a separator of its own.

    The model does so itself for windows of three separators, and raises for others.
    """
    separators = inputs["input_ids"] == model.config.sep_token_id
    if "global_attention_mask" not in inputs and separators.sum(1).max() > _LONGFORMER_SEPARATORS:
        inputs = {**inputs, "global_attention_mask": (separators.cumsum(1) == 0).long()}
    return args, inputs


def check_model(answerer: TorchAnswerer, origin: str) -> None:
    """Refuse a model that cannot be served: run it in eval mode on windows of two lengths, alone and padded to one batch.

    Raises UsageError naming the model's type when it does not run, computes no numbers, or answers otherwise with padding.
    """
    model, task = answerer.model, answerer.task
    kind, remedy = f"{origin}: models of type {model.config.model_type}", "start from another model, a BERT, say"
    if model.config.model_type == "xlnet":
        raise UsageError(f"{kind} have no answers to compare with: transformers' pipeline misplaces theirs", remedy)
    windows = [next(answerer.tokenizer.windows(answerer.tokenizer.question("a"), answerer.tokenizer.context(text)))
               for text in _TRIED]  # fmt: skip

    def logits(rows: Sequence[int]) -> list[NDArray[np.float32]]:
        ids, mask = padded([windows[row].ids for row in rows], task.pad_token_id)
        both = answerer.run(with_types(task, ids.numpy(), mask.numpy(), windows, rows))
        return [np.stack([part[i, : len(windows[row].ids)] for part in both]) for i, row in enumerate(rows)]

    training = model.training
    model.eval()
    try:
        alone, together = [logits([row])[0] for row in range(len(windows))], logits(range(len(windows)))
    except Exception as error:  # whatever the architecture raises, it cannot answer questions like these
        if model.config.num_labels != 2:
            raise ArtifactError(
                f"{origin}: its head has {model.config.num_labels} outputs for each token, and an answer needs two: start and end",
                "fine-tune a checkpoint without such a head, or correct id2label in config.json",
            ) from error
        raise UsageError(f"{kind} do not run on a short text: {first_line(error)}", remedy) from error
    model.train(training)
    if not all(np.isfinite(part).all() for part in alone):
        raise ArtifactError(f"{origin}: computes NaN or infinity for a short text", "check the weights, or train again")
    for own, other in zip(alone, together):
        if np.abs(own - other).max() > _TOLERANCE * max(1.0, float(np.abs(own).max())):
            raise UsageError(
                f"{kind} answer otherwise when a text is padded, so they cannot be served in batches", remedy
            )


def task_of(path: Path, tokenizer: Any, model: Any) -> QuestionAnswering:
    """Return the task of a checkpoint from its manifest, or from its tokenizer and config if it was trained
    elsewhere."""
    if (path / MANIFEST).exists():
        task: TaskFacts = load_manifest(path, "checkpoint", verify=False).task
        assert isinstance(task, QuestionAnswering), "load_model refuses others"
        return task
    length = min(_USUAL_LENGTH, max_tokens(tokenizer, model.config))
    return facts_of(tokenizer, model, max_length=length, doc_stride=min(_USUAL_STRIDE, length // 2))


def facts_of(tokenizer: Any, model: Any, **chosen: Any) -> QuestionAnswering:
    """Return a model's facts: those ``chosen``, the rest from its tokenizer and config."""
    return QuestionAnswering(
        pad_token_id=pad_token_id(tokenizer),
        question_first=tokenizer.padding_side == "right",
        token_types=trained_with_token_types(tokenizer, model),
        **chosen,
    )
