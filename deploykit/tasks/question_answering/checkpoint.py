"""Run a Hugging Face model for extractive question answering in PyTorch."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.predictor import Answerer, Logits
from deploykit.tasks.question_answering.windows import PairTokenizer
from deploykit.training.checkpoint import check_vocabulary, load_model, load_tokenizer, max_tokens, pad_token_id, quiet

_USUAL_LENGTH, _USUAL_STRIDE = 384, 128
"""Default window length and stride (tokens), as BERT's authors used for SQuAD."""


class TorchAnswerer(Answerer):
    """A checkpoint run by PyTorch: the reference for every export."""

    def __init__(self, model: Any, tokenizer: Any, task: QuestionAnswering) -> None:
        self.model = model
        self.hub_tokenizer = tokenizer
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        super().__init__(task, PairTokenizer(own, task), self.run, DEFAULT_TOKEN_BUDGET)

    @classmethod
    def load(cls, path: Path) -> TorchAnswerer:
        quiet()
        tokenizer, model = load_tokenizer(str(path)), load_model(str(path), QuestionAnswering.name)
        check_vocabulary(model, tokenizer, str(path))
        return cls(model, tokenizer, task_of(path, tokenizer, model))

    def run(self, inputs: dict[str, NDArray[np.int64]]) -> tuple[Logits, Logits]:
        """Return start and end logits, float32 [windows, tokens]."""
        device = next(self.model.parameters()).device  # a GPU during training on one
        with torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array).to(device) for name, array in inputs.items()})
        start, end = (np.asarray(logits.float().cpu().numpy()) for logits in (output.start_logits, output.end_logits))
        return start, end


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
        token_types=_takes_token_types(tokenizer, model),
        **chosen,
    )


def _takes_token_types(tokenizer: Any, model: Any) -> bool:
    """Return whether token type ids change the model's outputs."""
    return (
        "token_type_ids" in tokenizer.model_input_names
        and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
        and "token_type_ids" in inspect.signature(model.forward).parameters
    )
