"""Generate answers with any language model: prompts in, texts out. Neither torch nor transformers is needed.

A row's answer is the same in any company. Prompts are padded on the left to a multiple of ``_BLOCK`` tokens, and rows
are decoded beside rows of the same padded length alone: each product that a row takes part in then adds up the same
numbers in the same order, whatever rows stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.runtime.engines.causal_lm import CausalLm
from deploykit.runtime.sampling import Sampler, Sampling
from deploykit.runtime.stream_text import StreamText
from deploykit.runtime.token_distribution import top_tokens
from deploykit.tasks.text_generation.best_of import likeliest
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.grammar import Constraint, Grammars

Finish = Literal["eos", "stop", "length"]
Prompt = str | Sequence[Mapping[str, Any]]
"""A text to continue, or the messages of a dialog to answer."""

_BLOCK = 32
_ROWS = 16
"""Most rows that are decoded side by side."""
_TOKENS = 2048
"""Most tokens of rows that are read side by side, unless one row has more."""
_CHUNK = 512
"""Tokens of each row that one call reads: their logits over the whole vocabulary are in memory at once."""


@dataclass(frozen=True)
class Generated:
    """One answer. ``tokens`` counts the generated ones, the end token included. ``finish`` is "length" where
    ``max_new_tokens`` or the context ended it. ``logprobs`` are of its tokens, before any rule of sampling;
    ``top_logprobs`` pairs of id and log-probability of the likeliest tokens at each position, if asked for."""

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


class TextGenerator(Protocol):
    """A language model that answers: a checkpoint, an export, or a served model."""

    @property
    def task(self) -> TextGeneration: ...

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling | None = None, *, progress: Callable[[int], None] = ...
    ) -> list[list[Generated]]:
        """Return ``sampling.n`` answers to each prompt (token ids)."""

    def score(self, rows: Sequence[EncodedRow]) -> Iterator[RowScore]:
        """Return the log-probabilities of each row's supervised tokens, in order."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class RowScore:
    """``logprobs`` float32 [supervised tokens] of one row, and whether each was the likeliest token (``best``)."""

    logprobs: NDArray[np.float32]
    best: NDArray[np.bool_]


@dataclass
class _Row:
    """An answer that is being decoded."""

    prompt: Sequence[int]
    sampler: Sampler
    stream: StreamText
    constraint: Constraint | None
    place: tuple[int, int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: Finish | None = None
    text: str = ""


class LocalGenerator:
    """A language model in this process."""

    def __init__(self, task: TextGeneration, tokenizer: ChatTokenizer, model: CausalLm) -> None:
        self.task, self.tokenizer, self.model = task, tokenizer, model
        self.grammars = Grammars(tokenizer.tokenizer, task.vocabulary, task.eos_token_ids)

    def close(self) -> None:
        """Nothing to release."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling | None = None,
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Generated]]:
        """Return ``sampling.n`` answers to each prompt, in order. ``progress`` is called with the answers that came.

        Raises DataError for a prompt that is empty or leaves no room in the context for an answer.
        """
        sampling = sampling or self.task.sampling
        for prompt in prompts:
            self.check(prompt)
        sampling.check_tokens(self.task.vocabulary)
        rows = [
            self._row(prompt, sampling, (i, answer))
            for i, prompt in enumerate(prompts)
            for answer in range(sampling.candidates)
        ]
        found: list[list[Generated | None]] = [[None] * sampling.candidates for _ in prompts]
        for group in _groups(rows):
            for row in self._decode(group, sampling):
                assert row.finish is not None
                i, answer = row.place
                found[i][answer] = Generated(
                    row.text, row.finish, len(row.prompt), len(row.ids), tuple(row.ids), tuple(row.logprobs),
                    tuple(row.top_logprobs),
                )  # fmt: skip
                progress(1)
        return [likeliest([answer for answer in answers if answer is not None], sampling.n) for answers in found]

    def _row(self, prompt: Sequence[int], sampling: Sampling, place: tuple[int, int]) -> _Row:
        constraint = self.grammars.constraint(sampling)
        sampler = Sampler(sampling, prompt, place[1], ends=self.task.eos_token_ids, constraint=constraint)
        stream = StreamText(self.tokenizer.text_decoder, sampling.stop, sampling.min_new_tokens)
        return _Row(prompt, sampler, stream, constraint, place)

    def check(self, prompt: Sequence[int]) -> None:
        """Raise DataError for a prompt that cannot be answered."""
        if not prompt:
            raise DataError("the prompt is empty", "give a text")
        if len(prompt) >= self.task.max_length:
            raise DataError(
                f"the prompt has {len(prompt):,} tokens, and the model's context holds {self.task.max_length:,}, answer included",
                "shorten the prompt",
            )

    def _decode(self, rows: list[_Row], sampling: Sampling) -> Iterator[_Row]:
        """Decode rows of one padded length together; each is yielded when it is done."""
        length = _padded(len(rows[0].prompt))
        ids = np.full((len(rows), length), self.task.pad_token_id, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            ids[i, length - len(row.prompt) :] = row.prompt
            mask[i, length - len(row.prompt) :] = 1
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        logits, cache = np.empty(0, np.float32), None
        for start, end in _chunks(length):
            part = ids[:, start:end], mask[:, :end], positions[:, start:end]
            logits, cache = self.model.run(*part, cache, last=True)
        while True:
            for row, values in zip(rows, logits[:, -1]):
                self._add(row, values, sampling)
            yield from (row for row in rows if row.finish is not None)
            left = [i for i, row in enumerate(rows) if row.finish is None]
            if not left:
                return
            if len(left) < len(rows):
                cache, mask = self.model.keep(cache, left), mask[left]
                rows = [rows[i] for i in left]
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
            ids = np.array([[row.ids[-1]] for row in rows], np.int64)
            positions = np.array([[len(row.prompt) + len(row.ids) - 1] for row in rows], np.int64)
            logits, cache = self.model.run(ids, mask, positions, cache, last=True)

    def _add(self, row: _Row, logits: NDArray[np.float32], sampling: Sampling) -> None:
        """Choose the next token of a row, and see whether it ends the answer."""
        token = row.sampler.choose(logits)
        row.ids.append(token)
        log_sum = _log_sum(logits)
        row.logprobs.append(float(logits[token] - log_sum))
        if sampling.logprobs:
            top = top_tokens(logits, sampling.logprobs)
            row.top_logprobs.append(tuple((int(i), float(logits[i] - log_sum)) for i in top))
        if token in sampling.stop_token_ids or (token in self.task.eos_token_ids and not sampling.ignore_eos):
            row.finish = "eos"
        elif row.constraint is not None and row.constraint.done:
            row.finish = "stop"
        elif len(row.ids) >= sampling.max_new_tokens or len(row.prompt) + len(row.ids) >= self.task.max_length:
            row.finish = "length"
        row.text += row.stream.add(token)
        if row.finish is not None:
            row.text += row.stream.finish()
        if row.stream.stopped:
            row.finish = "stop"

    def score(self, rows: Sequence[EncodedRow]) -> Iterator[RowScore]:
        """Return the log-probabilities of each row's supervised tokens, in order."""
        for row, logits in zip(rows, self.supervised_logits(rows)):
            targets = row.ids[1:][row.supervised[1:]]
            chosen = logits[np.arange(len(targets)), targets]
            yield RowScore(chosen - _log_sum(logits), logits.argmax(1) == targets)

    def supervised_logits(self, rows: Sequence[EncodedRow]) -> Iterator[NDArray[np.float32]]:
        """Return for each row the logits that predict its supervised tokens, float32 [supervised, vocabulary]."""
        for part in _scored_together(rows):
            length = max(len(row.ids) for row in part)
            ids = np.full((len(part), length), self.task.pad_token_id, np.int64)
            mask = np.zeros((len(part), length), np.int64)
            for i, row in enumerate(part):
                ids[i, length - len(row.ids) :] = row.ids
                mask[i, length - len(row.ids) :] = 1
            positions = np.maximum(mask.cumsum(1) - 1, 0)
            # Where a logit predicts a supervised token: the position before it.
            wanted = np.zeros((len(part), length), bool)
            for i, row in enumerate(part):
                wanted[i, length - len(row.ids) : -1] = row.supervised[1:]
            found: list[list[NDArray[np.float32]]] = [[] for _ in part]
            cache = None
            for start, end in _chunks(length):
                logits, cache = self.model.run(
                    ids[:, start:end], mask[:, :end], positions[:, start:end], cache, last=False
                )
                for i, pieces in enumerate(found):
                    pieces.append(logits[i, wanted[i, start:end]])
            yield from (np.concatenate(pieces) for pieces in found)


def _groups(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of the same padded length, as many as fit ``_ROWS`` and ``_TOKENS``."""
    by_length: dict[int, list[_Row]] = {}
    for row in rows:
        by_length.setdefault(_padded(len(row.prompt)), []).append(row)
    for length in sorted(by_length):
        remaining = iter(by_length[length])
        while group := list(islice(remaining, max(1, min(_ROWS, _TOKENS // length)))):
            yield group


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _CHUNK):
        yield start, min(start + _CHUNK, length)


def _scored_together(rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
    """Consecutive rows that fit ``_TOKENS`` padded tokens."""
    part: list[EncodedRow] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if part and (len(part) + 1) * longest > _TOKENS:
            yield part
            part, longest = [], len(row.ids)
        part.append(row)
    if part:
        yield part


def _log_sum(logits: NDArray[np.float32]) -> Any:
    """log(sum(exp(logits))) over the last axis, float64 [...]."""
    most = logits.max(-1)
    return most + np.log(np.exp((logits - most[..., None]).astype(np.float64)).sum(-1))
