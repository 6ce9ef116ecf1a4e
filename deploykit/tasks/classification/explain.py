"""Texts of a classifier to explain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.explain import ExplainedText, Measure, check_gradients, log_odds, probability
from deploykit.attribution.words import Span, Unit, split_units, weights_of_words, without
from deploykit.errors import MissingDependencyError, UsageError
from deploykit.tasks.classification.facts import as_text
from deploykit.tasks.classification.predictor import TextClassifier

_BETWEEN = " | "
_AT_ONCE = 256
_STEPS = 50


class ClassifiedText:
    """A text, or a pair of texts, and a label of it."""

    def __init__(self, predictor: TextClassifier, text: str, label: str | None, unit: Unit) -> None:
        """``label`` is the label to explain, None for the likeliest. Raises UsageError if the model does not have it."""
        task = predictor.task
        self._predictor = predictor
        self._parts = task.read(text)
        self._begins = [0, *(len(self._parts[0]) + len(_BETWEEN) for _ in self._parts[1:])]
        self.text = _BETWEEN.join(self._parts)
        own = [[(first + begin, last + begin) for first, last in split_units(part, unit)]
               for part, begin in self._placed()]  # fmt: skip
        self.words: Sequence[Span] = [word for words in own for word in words]
        self.measure: Measure = "number" if task.regression else "log-odds"
        self.is_label = not task.regression
        scores = predictor.scores([text])[0]
        if label is None:
            label = task.labels[int(scores.argmax())]
        elif label not in task.labels:
            raise UsageError(f"--answer {label} is not a label of the model", f"it has: {', '.join(task.labels)}")
        self._index = task.labels.index(label)
        self.answer = f"{scores[0]:.6g}" if task.regression else label

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        texts = [self._without(words) for words in removed]
        scores = np.concatenate(
            [self._predictor.scores(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)]
        )
        of_label = scores[:, self._index].astype(np.float64)
        return log_odds(of_label) if self.is_label else of_label

    def score(self, value: float) -> float:
        return probability(value) if self.is_label else value

    def _placed(self) -> list[tuple[str, int]]:
        return list(zip(self._parts, self._begins))

    def _without(self, removed: Collection[int]) -> str:
        gone = [self.words[i] for i in removed]
        parts = [
            without(part, [(a - begin, b - begin) for a, b in gone if begin <= a < begin + len(part)])
            for part, begin in self._placed()
        ]
        return as_text(*parts) if self._predictor.task.pair else parts[0]


class DifferentiableText(ClassifiedText):
    """The same, of a checkpoint in PyTorch."""

    def gradients(self) -> list[float]:
        """Return each word's share of the label's log-odds, against a text of padding tokens (Sundararajan et al., ICML
        2017)."""
        import torch
        from captum.attr import LayerIntegratedGradients

        model, tokenizer, task = self._model.model, self._model.tokenizer, self._predictor.task
        encoded = tokenizer(
            *([part] for part in self._parts), truncation=True, max_length=task.max_length, return_tensors="pt",
            return_offsets_mapping=True, return_special_tokens_mask=True,
        )  # fmt: skip
        places, special = encoded.pop("offset_mapping")[0].tolist(), encoded.pop("special_tokens_mask").bool()
        begins = [self._begins[member] if member is not None else 0 for member in encoded.sequence_ids(0)]
        ids = encoded.pop("input_ids")
        padding = torch.where(special, ids, torch.full_like(ids, task.pad_token_id))

        def value(input_ids: Any) -> Any:
            inputs = {name: tensor.expand(len(input_ids), -1) for name, tensor in encoded.items()}
            logits = model(input_ids=input_ids, **inputs).logits.float() / task.temperature
            own = logits[:, self._index]
            if task.multi_label or task.regression:
                return own
            rest = torch.cat([logits[:, : self._index], logits[:, self._index + 1 :]], dim=1)
            return own - rest.logsumexp(dim=1)

        layer = LayerIntegratedGradients(value, model.get_input_embeddings())
        weights = layer.attribute(ids, baselines=padding, n_steps=_STEPS, internal_batch_size=_STEPS)
        of_tokens = weights.sum(dim=-1)[0].detach().tolist()
        tokens = [(a + begin, b + begin) for (a, b), begin in zip(places, begins)]
        return weights_of_words(self.words, tokens, of_tokens)

    @property
    def _model(self) -> Any:
        return self._predictor


def explained_text(predictor: TextClassifier, text: str, answer: str | None, method: str, unit: Unit) -> ExplainedText:
    """Return ``text`` to be explained by ``method``: "auto", "gradients" or "occlusion".

    Raises UsageError if ``method`` needs a checkpoint, MissingDependencyError if it needs captum.
    """
    if method == "occlusion":
        return ClassifiedText(predictor, text, answer, unit)
    try:
        check_gradients(is_checkpoint=hasattr(predictor, "model"))
    except (UsageError, MissingDependencyError):
        if method == "auto":
            return ClassifiedText(predictor, text, answer, unit)
        raise
    return DifferentiableText(predictor, text, answer, unit)
