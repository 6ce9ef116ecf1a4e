"""Run a Hugging Face classifier in PyTorch."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, UsageError, first_line
from deploykit.runtime.batching import batches
from deploykit.runtime.tokenizer import Encoded, shortened
from deploykit.tasks.classification.facts import LABEL_SEPARATOR, Classification
from deploykit.tasks.classification.padding import pads_left
from deploykit.tasks.classification.pairs import check_columns
from deploykit.tasks.classification.predictor import finite, graph_inputs
from deploykit.tasks.protocol import TaskFacts
from deploykit.text import normalize
from deploykit.training.checkpoint import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    max_tokens,
    pad_token_id_of,
    quiet,
    trained_with_token_types,
)

_LOG = logging.getLogger(__name__)

ANOTHER_MODEL = "start from another model; docs: Fine-tune, architectures"
"""Remedy for a model that cannot be served."""
_LONGEST_OF_PAIR = 4
"""Each text of a pair is cut to this many times the longest input before it is tokenized as transformers does: a cut far
beyond the one that serving makes, so that a fault of the serving code shows."""
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def task_of(path: Path, tokenizer: Any, config: Any, text_columns: Sequence[str] = ()) -> Classification:
    """Return the task in a checkpoint's manifest, or, for a checkpoint trained elsewhere, the task in its config with ``text_columns``."""
    if (path / MANIFEST).exists():
        task: TaskFacts = load_manifest(path, "checkpoint", verify=False).task
        assert isinstance(task, Classification), "load_model refuses others"
        return task
    regression = config.problem_type == "regression"
    if config.num_labels != 1 and regression:
        raise ArtifactError(
            f"{path}: its head gives {config.num_labels} numbers (problem_type regression), and one is served",
            "fine-tune the checkpoint with --regression",
        )
    labels = labels_of(config)
    if config.problem_type not in (None, *_PROBLEM_TYPES):
        raise ArtifactError(
            f"{path}: the problem_type {config.problem_type!r} in its config.json is unknown",
            f"correct it: {', '.join(_PROBLEM_TYPES)}",
        )
    if not labels or not all(labels) or len(set(labels)) < len(labels):
        raise ArtifactError(
            f"{path}: id2label in its config.json does not name each output once: {config.id2label}",
            "give each output, from 0 on, a name of its own",
        )
    # As transformers' pipeline: the sigmoid of one output, unless it says that it is a number.
    one_output = config.num_labels == 1 and not regression
    multi_label = one_output or config.problem_type == "multi_label_classification"
    if one_output:
        _LOG.warning(
            "%s: has one output, and its config.json does not say that it is a number: the answer is the probability of %r, "
            'as in transformers\' pipeline; if it is a number, write "problem_type": "regression" into config.json',
            path, labels[0],
        )  # fmt: skip
    if multi_label and (piped := next((label for label in labels if LABEL_SEPARATOR in label), None)):
        raise ArtifactError(
            f"{path}: id2label in its config.json has the label {piped!r}, and {LABEL_SEPARATOR!r} separates labels",
            "rename the label",
        )
    pair = len(text_columns) == 2
    if pair:
        check_separates(tokenizer, str(path))
    max_length = max_tokens(tokenizer, config)
    if max_length <= (special := tokenizer.num_special_tokens_to_add(pair=pair)):
        raise ArtifactError(
            f"{path}: it reads {max_length} tokens, and {special} of a text are special ones: no text has room",
            "correct model_max_length in tokenizer_config.json",
        )
    return Classification(
        labels=labels,
        max_length=max_length,
        pad_token_id=pad_token_id_of(tokenizer, config),
        multi_label=multi_label,
        regression=regression,
        text_columns=tuple(text_columns) if pair else ("text",),
        pair=pair,
    )


def labels_of(config: Any) -> tuple[str, ...]:
    """Return the names of a head's outputs, in their order, normalized as the labels of rows are; () if an output has no name."""
    names = [config.id2label.get(i) for i in range(config.num_labels)]
    return () if None in names else tuple(normalize(str(name)) for name in names)


def takes_token_types(model: Any, tokenizer: Any, *, pair: bool) -> bool:
    """Return whether the tokenizer's token types change the outputs of ``model``, in eval mode."""
    types = "token_type_ids"
    if types not in inspect.signature(model.forward).parameters:
        return False
    known = getattr(model.config, "type_vocab_size", None)
    if known is not None and known < 2:
        return False
    if types not in tokenizer.model_input_names and not trained_with_token_types(tokenizer, model):
        return False
    encoded = tokenizer(*(("a", "a") if pair else ("a",)), return_tensors="pt", return_token_type_ids=True)
    if encoded[types].any():
        return True
    with torch.inference_mode():
        return not torch.equal(model(**encoded).logits, model(**{**encoded, types: None}).logits)


def check_separates(tokenizer: Any, origin: str) -> None:
    """Raise UsageError for a tokenizer that puts no token between the two texts of a pair."""
    members = tokenizer("a", "a").sequence_ids(0)
    first = members.index(0) if 0 in members else 0
    if 1 not in members or None not in members[first : members.index(1)]:
        raise UsageError(
            f"the tokenizer of {origin} puts nothing between the two texts of a pair",
            "join the columns into one text, with a separator of your choice (finetune: --text-separator ' ')",
        )


class TorchClassifier:
    """A checkpoint run by PyTorch: the reference every export is compared with."""

    def __init__(self, model: Any, tokenizer: Any, task: Classification) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path, text_columns: Sequence[str] = ()) -> TorchClassifier:
        """Load a checkpoint. One trained elsewhere reads pairs if it is given two ``text_columns``."""
        quiet()
        tokenizer, model = load_tokenizer(str(path)), load_model(str(path))
        check_vocabulary(model, tokenizer, str(path))
        task = task_of(path, tokenizer, model.config, text_columns)
        check_columns(task, text_columns)
        if (
            getattr(model.config, "pad_token_id", None) is None
        ):  # a decoder's head reads the last token that is not padding
            model.config.pad_token_id = task.pad_token_id
        if not (path / MANIFEST).exists():
            return tried(cls(model, tokenizer, task), str(path))
        return cls(model, tokenizer, task)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return tokens as training and serving see them."""
        if not texts:
            return Encoded([], [])
        columns = zip(*map(self._parts, texts))
        encoded = self.tokenizer(
            *(list(column) for column in columns), truncation=True, max_length=self.task.max_length,
            return_token_type_ids=True,
        )  # fmt: skip
        return Encoded(
            [list(ids) for ids in encoded["input_ids"]], [list(types) for types in encoded["token_type_ids"]]
        )

    def _parts(self, text: str) -> tuple[str, ...]:
        """Return the tokenizer's input: one text, or two, without the ends that truncation drops in any case."""
        parts = self.task.read(text)
        if len(parts) == 1 or self._whole is None:
            return parts
        most = _LONGEST_OF_PAIR * self.task.max_length
        return tuple(shortened(self._whole, part, most, self.tokenizer.truncation_side) for part in parts)

    @cached_property
    def _whole(self) -> Tokenizer | None:
        """The tokenizer without truncation; None if it is one in Python."""
        if not self.tokenizer.is_fast:
            return None
        whole = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        whole.no_truncation()
        return whole

    def logits(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return raw outputs, float32 [rows, labels], of one padded batch (int64 [rows, tokens] by name)."""
        with torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return np.asarray(output.logits.numpy(), np.float32)

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]. Raises DataError for a text for which the model computes no number."""
        logits = np.empty((len(texts), len(self.task.labels)), np.float32)
        encoded = self.encode(texts)
        for batch in batches(
            encoded.ids, self.task.pad_token_id, max_length=self.task.max_length, pad_left=self.task.pad_left
        ):
            logits[batch.rows] = self.logits(graph_inputs(self.task, encoded, batch))
        return self.task.scores(finite(logits))

    def logits_alone(self, text: str) -> NDArray[np.float32]:
        """Logits, float32 [1, labels], as a user of transformers gets them: no batch, no padding, and all outputs of the
        checkpoint's tokenizer (for example token types) go into the model, and types if it was trained with them."""
        # In lists: transformers takes an empty second text for none, unless it is in one.
        parts = ([part] for part in self._parts(text))
        encoded = self.tokenizer(
            *parts, truncation=True, max_length=self.task.max_length, return_tensors="pt",
            return_token_type_ids=self.task.token_types or None,
        )  # fmt: skip
        with torch.inference_mode():
            return np.asarray(self.model(**encoded).logits.float().numpy(), np.float32)

    def close(self) -> None:
        """Do nothing: the model is freed with the object."""


def tried(classifier: TorchClassifier, origin: str) -> TorchClassifier:
    """Return the classifier with ``token_types`` and ``pad_left`` in its facts, if its model needs them.

    The model, in eval mode, is run on texts of two lengths, alone and padded to one batch. Raises UsageError naming the
    model's type when it does not run, or when padding changes its answers.
    """
    model, tokenizer, task = classifier.model, classifier.tokenizer, classifier.task
    kind = f"{origin}: models of type {model.config.model_type}"
    try:
        task = dataclasses.replace(task, token_types=takes_token_types(model, tokenizer, pair=task.pair))
        left = pads_left(TorchClassifier(model, tokenizer, task))
    except Exception as error:  # whatever the architecture raises, it cannot classify texts like these
        raise UsageError(f"{kind} do not run on a short text: {reason_of(error)}", ANOTHER_MODEL) from error
    if left is None:
        problem = f"{kind} answer otherwise when a text is padded, so they cannot be served in batches"
        raise UsageError(problem, ANOTHER_MODEL)
    return TorchClassifier(model, tokenizer, dataclasses.replace(task, pad_left=left))


def reason_of(error: Exception) -> str:
    """Return the error of an architecture or an engine as one line."""
    line = first_line(error)
    # The message of a KeyError is the key alone.
    return f"{type(error).__name__}: {line}" if isinstance(error, LookupError) and str(error).strip() else line
