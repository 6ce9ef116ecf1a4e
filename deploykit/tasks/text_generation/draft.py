"""Guess answers' next tokens with a draft model: a smaller model of the same vocabulary.

A guess is what the answer's own rules and random numbers choose from the draft's logits. The target then chooses from its own
logits, with the same random numbers, and keeps the guesses that it also chooses: its answers are the same as without a draft, sampled
ones too, at any load. Sources: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), for the
length of a guess; Daliri et al., "Coupling without Communication and Drafter-Invariant Speculative Decoding" (2024), for the
shared random numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from deploykit.errors import DeploykitError
from deploykit.runtime.engines.causal_lm import CausalLm, MixingCausalLm
from deploykit.runtime.sampler import Sampler
from deploykit.tasks.text_generation.prefixes import Prefixes

if TYPE_CHECKING:
    from deploykit.tasks.text_generation.decoder import Answer

_READ = 256
"""Maximum number of prompt tokens that the draft reads between two steps."""
_BEHIND = 32
"""Maximum number of an answer's tokens that the draft may lack; if it lacks more, it reads the whole answer again."""
_SHARE = 0.7
"""Initial share of right guesses, before any is known."""
_WEIGHT = 0.1
"""Weight of a token in the share of its answer."""
_WEIGHT_OF_ALL = 0.02
"""Weight of a token in the share of all answers, with which a new answer begins."""
_REST = 32
"""Number of tokens for which guessing pauses if it is slower; twice as many after each try."""
_MEASURED = 15


class DraftLm(CausalLm, MixingCausalLm, Protocol):
    """A language model that can be a draft. ``context``: most tokens of a row."""

    context: int


class Cost(NamedTuple):
    """The time of guessing a token, and of a step that checks guesses, in units of a step without guesses."""

    guess: float = 0.3
    check: float = 1.1


class Record:
    """The success of the guesses for one answer. ``share``: of right tokens, among those whose predecessors were right."""

    def __init__(self, share: float = _SHARE) -> None:
        self.share = share
        self._rest, self._rests = _REST, 0

    def learn(self, guessed: int, right: int) -> None:
        """Record how many of the ``guessed`` tokens were ``right``: tokens after the first wrong one say nothing."""
        for was_right in [1.0] * right + [0.0] * (right < guessed):
            self.share += _WEIGHT * (was_right - self.share)

    def tokens(self, most: int, cost: Cost) -> int:
        """Return the number of tokens to guess, up to ``most``: the one with the fastest expected generation."""
        if self._rests:
            self._rests -= 1
            return 0
        best, best_speed, expected = 0, 1.0, 1.0
        for count in range(1, most + 1):
            expected += self.share**count
            speed = expected / (cost.check + count * cost.guess)
            if speed > best_speed:
                best, best_speed = count, speed
        if not best and most:
            self._rests, self._rest, self.share = self._rest, 2 * self._rest, _SHARE
        return best


class Pace:
    """The times of steps, by the number of rows: medians of the latest ones, because other programs may interrupt a step."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], deque[float]] = {}

    def add(self, what: str, rows: int, seconds: float) -> None:
        self._seconds.setdefault((what, rows), deque(maxlen=_MEASURED)).append(seconds)

    def cost(self, rows: int) -> Cost:
        """Return the measured costs, or the initial ones."""
        guess, check, plain = (self._seconds.get((what, rows)) for what in ("guess", "check", "plain"))
        if not (guess and check and plain):
            return Cost()
        return Cost(median(guess) / median(plain), median(check) / median(plain))


@dataclass(eq=False)
class _Row:
    """A row of the draft: it has ``held`` tokens of the prompt and the answer, and ``guessed`` more."""

    answer: Answer
    held: int
    guessed: int = 0


class Draft:
    """The guesses of a draft model for the running answers."""

    def __init__(self, model: DraftLm) -> None:
        self.pace = Pace()
        self._model = model
        self._prefixes = Prefixes(model.prefix_tokens)
        self._rows: list[_Row] = []
        self._records: dict[Answer, Record] = {}
        self._share = _SHARE
        self._reading: Answer | None = None  # its text is in the prompt area, up to ``_read``
        self._read = 0
        model.remove(np.arange(model.rows))
        model.release_others()

    def forget(self, answers: Sequence[Answer]) -> None:
        """Release the rows of answers that have ended."""
        for answer in answers:
            self._records.pop(answer, None)
            if answer is self._reading:
                self._reading = None
        self._remove([number for number, row in enumerate(self._rows) if row.answer in answers])

    def _remove(self, rows: Sequence[int]) -> None:
        if rows:
            order = self._model.remove(np.array(rows, np.int64))
            self._rows = [self._rows[number] for number in order]

    def _record(self, answer: Answer) -> Record:
        return self._records.setdefault(answer, Record(self._share))

    def guess(self, rooms: Mapping[Answer, int], left: int, rows: int) -> dict[Answer, list[int]]:
        """Return guesses for answers, each with at most the tokens that it has room for, and at most ``left`` in total.
        ``rows``: of the target. An answer that the draft has not read yet is read in parts, and gets its guess later."""
        counts: dict[Answer, int] = {}
        held = {row.answer: row.held for row in self._rows}
        cost, behind = self.pace.cost(rows), len(rooms)
        for answer, room in rooms.items():
            length = len(answer.query.prompt) + len(answer.ids)
            most = min(room, left // behind, self._model.context - length)
            behind -= 1
            count = self._record(answer).tokens(most, cost) if most > 0 else 0
            if not count:
                continue
            if answer in held and length - held[answer] <= _BEHIND:
                counts[answer] = count
                left -= count
            elif self._reading in (None, answer):
                self._read_some(answer)
        return self._guessed(counts, rows) if counts else {}

    def learn(self, answer: Answer, guessed: int, right: int) -> None:
        """Record how many of the guessed tokens were right."""
        self._record(answer).learn(guessed, right)
        self._share += _WEIGHT_OF_ALL * (right - min(right + 1, guessed) * self._share)
        row = next(row for row in self._rows if row.answer is answer)
        row.held += min(right, row.guessed)
        row.guessed -= min(right, row.guessed)

    def _read_some(self, answer: Answer) -> None:
        """Read a part of an answer's tokens, and give it a row when all are read."""
        model, text = self._model, [*answer.query.prompt, *answer.ids[:-1]]
        if self._reading is None:
            self._remove([number for number, row in enumerate(self._rows) if row.answer is answer])
            self._reading = answer
            model.begin()
            self._read = self._prefixes.restore(model, text)
        part = text[self._read : self._read + _READ]
        model.feed(part, [])
        self._read += len(part)
        if self._read == len(text):
            self._prefixes.store(model, answer.query.prompt)
            self._rows.append(_Row(answer, self._read))
            model.admit(sum(min(row.answer.query.most_tokens, self._model.context) for row in self._rows))
            self._reading = None

    def _guessed(self, counts: dict[Answer, int], rows: int) -> dict[Answer, list[int]]:
        self._model.keep([-row.guessed for row in self._rows])  # those that were wrong
        feeds: list[list[int]] = []
        guesses: dict[Answer, list[int]] = {}
        samplers: dict[Answer, Sampler] = {}
        for row in self._rows:
            row.guessed = 0
            wanted = row.answer in counts
            text = row.answer.ids
            feeds.append(text[row.held - len(row.answer.query.prompt) :] if wanted else [])
            row.held += len(feeds[-1])
            if wanted:
                guesses[row.answer], samplers[row.answer] = [], row.answer.sampler.ahead()
        first = True
        while any(feeds):
            start = time.perf_counter()
            logits = self._model.mix(feeds)
            self._model.keep([len(feed) for feed in feeds])
            place = 0
            for number, (row, feed) in enumerate(zip(self._rows, feeds)):
                place += len(feed)
                feeds[number] = []
                if not feed:
                    continue
                row.guessed += 0 if first else len(feed)
                token = _chosen(samplers[row.answer], logits[place - 1])
                if token is None:
                    continue
                guesses[row.answer].append(token)
                if len(guesses[row.answer]) < counts[row.answer]:
                    feeds[number] = [token]
            first = False
            self.pace.add("guess", rows, time.perf_counter() - start)
        return guesses


def _chosen(sampler: Sampler, logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> int | None:
    """Return the token that a sampler chooses, or None if it cannot choose one."""
    try:
        return sampler.choose(logits)
    except DeploykitError:
        return None
