"""Explain translations: find the words of the text that led to a translation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.explain import ExplainedText, Measure
from deploykit.attribution.words import Span, Unit, split_units, split_words, without
from deploykit.errors import DataError, UsageError
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.tasks.translation.forced_decoding import ForcedTranslation, log_probabilities
from deploykit.tasks.translation.predictor import TextTranslator, Translator
from deploykit.tasks.translation.sentences import split_sentences
from deploykit.tasks.translation.source_prefix import cut_code
from deploykit.text import is_blank, normalize

_AT_ONCE = 16


class _Text:
    """A text, without the code of a target language before it."""

    is_label = False

    def __init__(self, predictor: TextTranslator, text: str, unit: Unit) -> None:
        self._predictor = predictor
        self._code, self.text = cut_code(normalize(text), predictor.task)
        self.words: Sequence[Span] = split_units(self.text, unit)


class ScoredTranslation(_Text):
    """A text and its translation, sentence by sentence, by a translator in this process."""

    measure: Measure = "log-probability"

    def __init__(self, predictor: Any, text: str, answer: str | None, unit: Unit) -> None:
        """``answer`` is the translation to explain, None for the model's. Raises DataError if the text is refused or the
        translation empty, UsageError for an ``answer`` of an export, which has no tokenizer for it."""
        super().__init__(predictor, text, unit)
        translator = self._translator = predictor if isinstance(predictor, Translator) else predictor.translator
        if answer is not None:
            encode = getattr(predictor, "encode_targets", None)
            if encode is None:
                raise UsageError(
                    "an export explains only its own translations", "leave out --answer, or give the checkpoint"
                )
            self._pieces, self._targets, self.answer = [(0, len(self.text))], encode([answer]), answer
            self._source(self.text)
        else:
            self._pieces, self._targets, texts, end = [], [], [], 0
            for piece, separator in split_sentences(self.text):
                sentences = self._begin(piece)
                translator.decoder.run(sentences, lambda sentence: None)
                for sentence in sentences:  # none of a blank piece
                    assert sentence.result is not None
                    self._pieces.append((end, end + len(piece)))
                    self._targets.append(sentence.result.tokens.tolist())
                    texts += [translator.sentence_text(sentence), separator]
                end += len(piece) + len(separator)
            self.answer = "".join(texts).strip()
        if not any(self._targets) or is_blank(self.answer):
            raise DataError("the translation is empty, so there is nothing to explain", "give another text")
        self._known: dict[tuple[int, str], float] = {}

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        asked = [[(i, self._without(piece, words)) for i, piece in enumerate(self._pieces)] for words in removed]
        new = list(dict.fromkeys(one for text in asked for one in text if one not in self._known))
        pairs = [ForcedTranslation(self._source(text), self._targets[i]) for i, text in new]
        self._known.update(zip(new, _scores(self._translator, pairs)))
        return np.array([math.fsum(self._known[one] for one in text) for text in asked])

    def score(self, value: float) -> float:
        return math.exp(value / sum(map(len, self._targets)))

    def _without(self, piece: Span, removed: Collection[int]) -> str:
        (begin, end), gone = piece, [self.words[i] for i in removed]
        own = [(max(a, begin) - begin, min(b, end) - begin) for a, b in gone if a < end and b > begin]
        return without(self.text[begin:end], own) if own else self.text[begin:end]

    def _source(self, piece: str) -> Sequence[int]:
        sentences = self._begin(piece)
        return sentences[0].token_ids if sentences else self._translator.empty_ids(self._code)

    def _begin(self, piece: str) -> list[Sentence]:
        """Return ``piece`` as a sentence, or none for a blank piece. Raises DataError if it is too long."""
        (job,) = self._translator.begin([self._code + piece], long_input="refuse", split="none", scored=False)
        return job.sentences


def _scores(translator: Translator[Any], pairs: Sequence[ForcedTranslation]) -> list[float]:
    """Return the log-probability of each translation."""
    decoder = translator.decoder
    if isinstance(decoder, Decoder):
        limits = decoder.model.limits
        size = _AT_ONCE if limits is None else min(_AT_ONCE, limits.rows)
        parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        tokens = [log_probabilities(decoder.model, translator.task, part) for part in parts]
        ends = [np.cumsum([len(pair.target) for pair in part])[:-1] for part in parts]
        return [float(values.sum()) for part, end in zip(tokens, ends) for values in np.split(part, end)]
    plain = dataclasses.replace(
        translator.task.generation, length_penalty=0.0, renormalize=False, forced_bos_token_id=None,
        forced_eos_token_id=None,
    )  # fmt: skip
    sums: list[float] = decoder.scores([pair.source for pair in pairs], [pair.target for pair in pairs], plain)
    return sums


class LikeTranslation(_Text):
    """A text and its translation by a served model, which cannot score a given translation: the similarity of two translations' words
    replaces the score."""

    measure: Measure = "similarity"

    def __init__(self, predictor: TextTranslator, text: str, unit: Unit) -> None:
        super().__init__(predictor, text, unit)
        self.answer = self._translate([self.text])[0]
        if is_blank(self.answer):
            raise DataError("the translation is empty, so there is nothing to explain", "give another text")

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        texts = [without(self.text, [self.words[i] for i in words]) if words else self.text for words in removed]
        own = _words(self.answer)
        likeness = [
            SequenceMatcher(None, own, _words(other), autojunk=False).ratio() for other in self._translate(texts)
        ]
        return np.array(likeness)

    def score(self, value: float) -> float:
        return value

    def _translate(self, texts: Sequence[str]) -> list[str]:
        return [one.text for one in self._predictor.translate([self._code + t for t in texts], scored=False)]


def _words(text: str) -> list[str]:
    return [text[a:b] for a, b in split_words(text)]


def explained_text(predictor: TextTranslator, text: str, answer: str | None, method: str, unit: Unit) -> ExplainedText:
    """Return a text to be explained by occlusion. Raises UsageError for gradients, and an ``answer`` of a served model."""
    if method == "gradients":
        raise UsageError("only occlusion explains translations", "leave out --method")
    if isinstance(predictor, Translator) or hasattr(predictor, "translator"):
        return ScoredTranslation(predictor, text, answer, unit)
    if answer is not None:
        raise UsageError(
            "a served model explains only its own translations", "leave out --answer, or give the checkpoint"
        )
    return LikeTranslation(predictor, text, unit)
