"""Translate texts in this process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

from typing_extensions import TypeVar

from deploykit.errors import DataError
from deploykit.runtime.decoding import MAX_CACHE_BYTES, Decoder, Seconds, Sentence, longest_first
from deploykit.runtime.engines import (
    TRANSLATION_ENGINE,
    load_decode_model,
)
from deploykit.runtime.engines.protocol import DecodeLimits
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.generation import MAX_ROWS, Generation
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.sentences import fit, split_lines, split_sentences
from deploykit.tasks.translation.source_prefix import cut_code
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
from deploykit.tasks.translation.translated import EMPTY, Translated, finish_of
from deploykit.text import is_blank, normalize

_PIECES: Mapping[Split, Callable[[str], list[tuple[str, str]]]] = {
    "sentence": split_sentences,
    "paragraph": split_lines,
    "none": lambda text: [(text, "")],
}
_TEXTS_AT_ONCE = 32  # tokenized in one call, during which other threads wait for the GIL
_CHARS_PER_TOKEN = 24  # a text with more characters per allowed token is too long, without tokenizing it


@dataclass
class Job:
    """A text being translated: its sentences, and the white space after each."""

    sentences: list[Sentence]
    separators: list[str]

    @property
    def done(self) -> bool:
        return all(sentence.result is not None for sentence in self.sentences)

    def cancel(self) -> None:
        """Stop decoding at the next step."""
        for sentence in self.sentences:
            sentence.cancelled = True


class Tokenizer(Protocol):
    """The tokenizer's interface for a translator."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


class Runner(Protocol):
    """A decoder of sentences. It measures the time spent in iterating ``sentences`` and in ``finish``."""

    seconds: Seconds

    def run(self, sentences: Iterable[Sentence], finish: Callable[[Sentence], None]) -> None:
        """Set each sentence's result, then call ``finish`` with it, in any thread."""


RunnerT = TypeVar("RunnerT", bound=Runner, default=Decoder)


class Translator(Generic[RunnerT]):
    """The tokenizer and decoder of one model. Not for concurrent calls."""

    def __init__(self, task: Translation, tokenizer: Tokenizer, decoder: RunnerT) -> None:
        self.task = task
        self.decoder = decoder
        self._tokenizer = tokenizer
        self._empty: dict[str, list[int]] = {}

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[Translated]:
        """Translate ``texts``, in their order; a blank text or one without tokens gives an empty translation.

        Without ``scored`` greedy search is faster, and scores are 0. Raises DataError for a text that begins with an
        unknown target code, or that is too long if ``long_input`` is "refuse", or for which the model computes no number.
        """
        generation = generation or self.task.generation
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        jobs: dict[int, Job] = {}

        def sentences() -> Iterator[Sentence]:
            for first in range(0, len(order), _TEXTS_AT_ONCE):
                numbers = order[first : first + _TEXTS_AT_ONCE]
                some = self._jobs([texts[i] for i in numbers], numbers, generation, long_input, split, scored)
                jobs.update(zip(numbers, some))
                yield from longest_first(sentence for job in some for sentence in job.sentences)

        self.decoder.run(sentences(), self._finish)
        return [self.result(jobs[number]) for number in range(len(texts))]

    def begin(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[Job]:
        """Tokenize ``texts``, and return jobs whose sentences can be passed to ``decoder.add``."""
        with self.decoder.seconds.counting("tokenizing"):
            generation = generation or self.task.generation
            return self._jobs(texts, range(len(texts)), generation, long_input, split, scored)

    def _jobs(
        self,
        texts: Sequence[str],
        numbers: Sequence[int],
        generation: Generation,
        long_input: LongInput,
        split: Split,
        scored: bool,
    ) -> list[Job]:
        """Split and tokenize texts; errors name each text by its number in ``numbers``."""
        codes, pieces = [], []
        for number, text in zip(numbers, texts):
            try:
                code, body = cut_code(normalize(text), self.task)
            except DataError as error:
                raise DataError(f"text {number}: {error.message}", error.remedy) from error
            codes.append(code)
            pieces.append(_PIECES[split](body))
        encoded = iter(self._tokenizer.encode([code + piece for code, cut in zip(codes, pieces) for piece, _ in cut]))
        jobs = []
        for number, code, cut in zip(numbers, codes, pieces):
            job = Job([], [])
            for piece, separator in cut:
                ids = next(encoded)
                if is_blank(piece) or ids == self.empty_ids(code):
                    if job.separators:  # keep blank lines
                        job.separators[-1] += separator
                    continue
                if len(ids) <= self.task.max_source_length:
                    parts = [(ids, separator)]
                elif long_input == "refuse":
                    raise DataError(
                        f"text {number}: the text has {len(ids)} tokens, the model takes {self.task.max_source_length}",
                        "shorten it, or let it be split at sentence ends",
                    )
                else:
                    parts = self._split(code, piece, separator)
                job.sentences += [Sentence(ids, generation, scored) for ids, _ in parts]
                job.separators += [after for _, after in parts]
            jobs.append(job)
        return jobs

    def empty_ids(self, code: str) -> list[int]:
        """Return the token ids of an empty text."""
        if code not in self._empty:
            [self._empty[code]] = self._tokenizer.encode([code])
        return self._empty[code]

    def _finish(self, sentence: Sentence) -> None:
        assert sentence.result is not None
        sentence.text = self._tokenizer.decode([sentence.result.tokens.tolist()])[0]

    def sentence_text(self, sentence: Sentence) -> str:
        """Return the text of a sentence that is done."""
        if sentence.text is None:
            with self.decoder.seconds.counting("detokenizing"):
                self._finish(sentence)
        assert sentence.text is not None
        return sentence.text

    def result(self, job: Job) -> Translated:
        """Join the sentences of a job that is done. Its score is their mean, weighted by target tokens.

        Raises NoNumberError if the model computed no number for a sentence.
        """
        if not job.sentences:
            return EMPTY
        if any(sentence.result is not None and math.isnan(sentence.result.score) for sentence in job.sentences):
            raise NoNumberError
        tokens, scores, length = 0, 0.0, False
        texts = []
        for sentence in job.sentences:
            assert sentence.result is not None
            ids = sentence.result.tokens.tolist()
            tokens += len(ids)
            scores += sentence.result.score * len(ids)
            length |= finish_of(ids, sentence.generation, self.task.eos_token_ids) == "length"
            texts.append(self.sentence_text(sentence))
        joined = "".join(text + after for text, after in zip(texts, job.separators))
        source_tokens = sum(len(sentence.token_ids) for sentence in job.sentences)
        return Translated(joined, scores / tokens, source_tokens, tokens, "length" if length else "eos")

    def close(self) -> None:
        """Do nothing: the graphs are freed with the object."""

    def _split(self, code: str, text: str, separator: str) -> list[tuple[list[int], str]]:
        def tokens(piece: str) -> int:
            if len(piece) > _CHARS_PER_TOKEN * self.task.max_source_length:
                return len(piece)
            return len(self._tokenizer.encode([code + piece])[0])

        parts = fit(text, tokens, self.task.max_source_length)
        separators = [after for _, after in parts[:-1]] + [separator]
        return list(zip(self._tokenizer.encode([code + piece for piece, _ in parts]), separators))


def load_translator(
    folder: Path,
    task: Translation,
    files: Sequence[str],
    threads: int,
    *,
    engine: str = TRANSLATION_ENGINE,
    device: int = 0,
    max_rows: int = MAX_ROWS,
    max_cache_bytes: int = MAX_CACHE_BYTES,
) -> Translator:
    """Load a translator from the folder of an export or a packaged version; ``files`` are those of its ``DecodeModel``.

    If the model's limits are lower than ``task`` and ``max_rows``, the translator's own ``task`` and decoder have them.
    """
    tokenizer = load_translation_tokenizer(folder, task.source, task.target)
    model = load_decode_model(engine, folder, files, threads, device)
    if model.limits is not None:
        task, max_rows = within(task, model.limits), min(max_rows, model.limits.rows)
    decoder = Decoder(model, task, max_rows=max_rows, max_cache_bytes=max_cache_bytes, workers=threads)
    return Translator(task, tokenizer, decoder)


def within(task: Translation, limits: DecodeLimits) -> Translation:
    """Return the task with lengths within ``limits``: longer texts are split, longer translations cut off."""
    target = min(task.max_target_length, limits.target)
    longest = min(task.generation.max_length, target)
    return dataclasses.replace(
        task,
        max_source_length=min(task.max_source_length, limits.source),
        max_target_length=target,
        generation=dataclasses.replace(
            task.generation, max_length=longest, min_length=min(task.generation.min_length, longest)
        ),
    )


class TextTranslator(Protocol):
    """A translator in this process or on a server."""

    task: Translation

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[Translated]:
        """Translate each text, in their order; ``generation`` replaces the task's own.

        Without ``scored`` the search may be faster, and scores 0. Raises DataError or RequestError for a text that is
        too long, if ``long_input`` is "refuse".
        """

    def close(self) -> None:
        """Release connections."""
