"""Decode the answers to many prompts together: requests join and leave the batch between two steps.

A row's answer does not depend on other rows, to the bit. Each row attends to its own caches only, and matrix products treat
all tokens of a call in the same way if there are at least two. ONNX Runtime's attention computes queries in blocks, of a multiple of
16 tokens (twice the head size), and a single remaining query would be computed like a lone one. So a prompt is never read in parts
of 1, 17, 33, ... tokens, unless it has only one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError, DeploykitError
from deploykit.runtime.engines.causal_lm import CausalLm, Logits, MixingCausalLm, Part
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.sampler import Sampler
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.stream_text import StreamText
from deploykit.runtime.triton_messages import CONTEXT_HOLDS
from deploykit.tasks.text_generation.beam import BeamSearch, rearranged
from deploykit.tasks.text_generation.draft import Draft
from deploykit.tasks.text_generation.encode import ChatTokenizer
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.grammar import Constraint
from deploykit.tasks.text_generation.logprobs import TokenLogprob, token_logprob
from deploykit.tasks.text_generation.prefixes import PREFIX_BLOCK, Prefixes
from deploykit.tasks.text_generation.prompt_lookup import PromptLookup

Finish = Literal["eos", "stop", "length"]

_QUERY_BLOCK = 16
_PROMPT_TOKENS = 512
"""Maximum number of prompt tokens that are read between two steps if no row is running."""
_PROMPT_TOKENS_BETWEEN = 64
"""The same while rows are running."""
_PROMPT_TOKENS_BESIDE = 128
"""The same in one pass with the rows' next tokens: fewer tokens would delay prompts, more would slow the rows down."""


@dataclass(eq=False)
class Answer:
    """An answer that is being generated, or one hypothesis of a beam search, of which all share ``beams``.

    ``text`` grows by whole characters, and never contains a part of a stop string.
    ``total_logprob`` is the sum of its tokens' log-probabilities, if these or ``best_of`` were requested.
    """

    query: Query
    number: int
    sampler: Sampler
    stream: StreamText
    constraint: Constraint | None = None
    beams: BeamSearch | None = None
    lookup: PromptLookup | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    total_logprob: float = 0.0
    finish: Finish | None = None


@dataclass(eq=False)
class Query:
    """A prompt, and the answers that are generated to it, each with one of the ``constraints`` if there are any.
    ``on_tokens`` is called after a step with new tokens.

    ``error``: why it has no answers: its constraint became too complex to follow, or the model computed no number.
    ``prompt_logprobs``: also compute those of the prompt's tokens; the first token has none.
    """

    prompt: Sequence[int]
    sampling: Sampling
    constraints: Sequence[Constraint] = ()
    on_tokens: Callable[[Query], None] | None = None
    prompt_logprobs: bool = False
    cancelled: bool = False
    error: DeploykitError | None = None
    answers: list[Answer] = field(default_factory=list)
    of_prompt: list[TokenLogprob] = field(default_factory=list)

    @property
    def claims(self) -> int:
        """Number of rows that its answers take."""
        return self.sampling.candidates

    @property
    def most_tokens(self) -> int:
        """Most tokens of the prompt and one answer, whatever the model's context."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def done(self) -> bool:
        return self.error is not None or (
            bool(self.answers) and all(answer.finish is not None for answer in self.answers)
        )

    def kept(self) -> list[Answer]:
        """Return the finished answers: of more than ``n`` those with the highest mean log-probability."""
        if len(self.answers) <= self.sampling.n:
            return self.answers
        return sorted(self.answers, key=lambda answer: -answer.total_logprob / max(len(answer.ids), 1))[
            : self.sampling.n
        ]


@dataclass(frozen=True)
class _Part:
    """Tokens of a prompt to read, from the position ``start`` on. ``whole``: the part ends the prompt. ``area``: the prompt area for
    them, of a model that has several."""

    query: Query
    start: int
    ids: Sequence[int]
    whole: bool
    area: Any

    @property
    def wanted(self) -> int:
        """Number of the last tokens whose logits are wanted."""
        return len(self.ids) if self.query.prompt_logprobs else int(self.whole)


class Decoder:
    """The ``waiting`` queries, and the answers that are ``running``: one for each row of the model. One caller at a time.

    ``tokens`` counts those generated since the decoder was made.
    """

    def __init__(
        self, model: CausalLm, task: TextGeneration, tokenizer: ChatTokenizer, draft: Draft | None = None
    ) -> None:
        self.waiting: deque[Query] = deque()
        self.running: list[Answer] = []
        self.tokens = 0
        self.max_rows = model.max_rows
        self._model, self._task, self._tokenizer = model, task, tokenizer
        self._eos = frozenset(task.eos_token_ids)
        self._prefixes = Prefixes(model.prefix_tokens)
        self._mixing = model if isinstance(model, MixingCausalLm) else None
        self._draft = draft
        self._drafted: dict[Answer, list[int]] = {}  # the draft's guesses of this step
        self._reading: Query | None = None  # its prompt is in the model's prompt area, up to ``_read``
        self._read = 0
        model.remove(np.arange(model.rows))
        if self._mixing is not None:
            self._mixing.release_others()

    @property
    def claimed(self) -> int:
        """Number of rows that the running and waiting queries take."""
        reading = [] if self._reading is None else [self._reading]
        return len(self.running) + sum(query.claims for query in (*reading, *self.waiting))

    @property
    def cache_use(self) -> float:
        """Share of the caches that is reserved for the running answers, 0 to 1."""
        return self._running_tokens() / self._model.max_tokens

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self._reading)

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise DataError for a query that could never run."""
        if not prompt:
            raise DataError("the prompt is empty", "give a text")
        if (token := max(prompt)) >= self._task.vocabulary:  # Gemma 3's tokenizer has one for images
            raise DataError(
                f"the prompt has the token {token}, and the model has {self._task.vocabulary:,} tokens",
                "leave out the special token that it stands for",
            )
        if len(prompt) >= self._task.max_length:
            raise DataError(
                f"the prompt has {len(prompt):,} tokens, and {CONTEXT_HOLDS} {self._task.max_length:,}, answer included",
                "shorten the prompt",
            )
        if sampling.candidates > self.max_rows:
            raise DataError(
                f"{_named(sampling)} is {sampling.candidates}, and the model decodes {self.max_rows} answers at once",
                "lower it, or package with a larger --max-num-seqs",
            )
        sampling.check_tokens(self._task.vocabulary)
        needed = self._reserved(prompt, sampling)
        if needed > self._model.max_tokens:
            raise DataError(
                f"prompt and answers may take {needed:,} tokens, and the model's caches hold {self._model.max_tokens:,}",
                "lower max_new_tokens, or package with a larger --max-cache-mb",
            )

    def add(self, query: Query) -> None:
        """Append a checked query to the waiting ones."""
        self.waiting.append(query)

    def step(self, *, steadily: bool = True) -> list[Query]:
        """Read parts of prompts, generate a token for every row, and return the finished queries.

        ``steadily``: read small parts of prompts while rows run, so that their tokens arrive at an even pace. Otherwise
        rows are filled first, so that fewer steps are needed in all.
        """
        self._remove([i for i, answer in enumerate(self.running) if answer.query.cancelled])
        if self._reading is not None and self._reading.cancelled:
            self._reading = None
        some = _PROMPT_TOKENS_BETWEEN if self._mixing is None else _PROMPT_TOKENS_BESIDE
        left = some if steadily and self.running else _PROMPT_TOKENS
        parts = [] if self._mixing is None else list(self._parts(left))
        grown: dict[Query, None] = {}  # a set in order
        if self.running or parts:
            of_parts = self._step_rows(parts)
            grown = dict.fromkeys(answer.query for answer in self.running)
            self._remove_finished()
            if parts:
                grown |= dict.fromkeys(self._take_all(parts, of_parts))
        if self._mixing is None:
            for part in self._parts(left):
                logits = self._model.feed(part.ids, range(len(part.ids))[len(part.ids) - part.wanted :])
                if self._take(part, logits):
                    grown[part.query] = None
        for query in grown:
            if query.on_tokens is not None:
                query.on_tokens(query)
        return [query for query in grown if query.done]

    def _step_rows(self, parts: Sequence[_Part]) -> Logits:
        """Generate a token for every row, and more if guesses of the next ones are right, and read ``parts`` in the same pass.
        Returns the logits wanted of these."""
        guesses = self._guesses()
        if any(guesses):
            return self._try(guesses, parts)
        tokens, began = [answer.ids[-1] for answer in self.running], time.perf_counter()
        if parts:
            assert self._mixing is not None
            logits = self._mixing.mix([[token] for token in tokens], _for_model(parts))
            self._mixing.keep([1] * len(tokens))
        else:
            logits = self._model.step(np.array(tokens, np.int64))
        self._took("plain", began, parts)
        searched = set()
        for row, answer in enumerate(self.running):
            if answer.beams is None:
                self._extend(answer, logits[row])
            elif answer.query not in searched:
                searched.add(answer.query)
                self._advance(answer.query, logits)
        return logits[len(tokens) :]

    def _guesses(self) -> list[list[int]]:
        """Return tokens that may come next in each row; none where a step with them would take much longer."""
        if self._mixing is None or any(answer.beams is not None for answer in self.running):
            return []
        left, found, rooms = self._mixing.tokens_of_a_step - len(self.running), [], []
        if left <= 0:
            return []
        for answer in self.running:
            assert answer.lookup is not None
            prompt, most = len(answer.query.prompt), answer.query.sampling.max_new_tokens
            room = min(prompt + most, self._task.max_length) - prompt - len(answer.ids) - 1
            guess = answer.lookup.guess(min(left, room)) if left > 0 and room > 0 else []
            rooms.append(room)
            left -= len(guess)
            found.append(guess)
        if self._draft is not None:
            self._drafted = self._draft.guess(
                {answer: room for answer, room, guess in zip(self.running, rooms, found) if not guess}, left, len(found)
            )
            found = [guess or self._drafted.get(answer, []) for answer, guess in zip(self.running, found)]
        return found

    def _try(self, guesses: Sequence[list[int]], parts: Sequence[_Part]) -> Logits:
        """Append to each row the guessed tokens that it chooses itself, and the token that it chooses after them.

        A row's logits do not depend on other tokens of the pass, so it gets the same tokens as without guesses.
        """
        assert self._mixing is not None
        tokens = [[answer.ids[-1], *guess] for answer, guess in zip(self.running, guesses)]
        began = time.perf_counter()
        logits = self._mixing.mix(tokens, _for_model(parts))
        self._took("check", began, parts)
        start, kept = 0, []
        for answer, guess in zip(self.running, guesses):
            right = 0
            self._extend(answer, logits[start])
            while answer.finish is None and right < len(guess) and answer.ids[-1] == guess[right]:
                right += 1
                self._extend(answer, logits[start + right])
            assert answer.lookup is not None
            if answer in self._drafted:
                assert self._draft is not None
                self._draft.learn(answer, len(guess), right)
            else:
                answer.lookup.learn(len(guess), right)
            kept.append(1 + right)
            start += 1 + len(guess)
        self._mixing.keep(kept)
        return logits[start:]

    def _took(self, what: str, began: float, parts: Sequence[_Part]) -> None:
        """Note what a step took that read no prompts."""
        if self._draft is not None and not parts:
            self._draft.pace.add(what, len(self.running), time.perf_counter() - began)

    def _parts(self, left: int) -> Iterator[_Part]:
        """Yield about ``left`` tokens of the prompt that is being read and of those that wait, while they can run.

        A model with one prompt area must read each part before the next is asked for.
        """
        beside: list[_Part] = []
        while left > 0:
            query = self._reading or self._begin(beside)
            if query is None:
                return
            rest = len(query.prompt) - self._read
            count = _part(rest, max(left // PREFIX_BLOCK, 1) * PREFIX_BLOCK)
            ids = query.prompt[self._read : self._read + count]
            area = None if self._mixing is None else self._mixing.area
            part = _Part(query, self._read, ids, count == rest, area)
            self._read += count
            left -= count
            if part.whole:
                self._reading = None
            if self._mixing is not None:
                beside.append(part)
            yield part
            if not part.whole:
                return

    def _begin(self, beside: Sequence[_Part]) -> Query | None:
        """Move the first waiting query to a prompt area, if there is room for its answers with those of the prompts that
        are read ``beside`` it."""
        while self.waiting and self.waiting[0].cancelled:
            self.waiting.popleft()
        if not self.waiting:
            return None
        query, others = self.waiting[0], [part.query for part in beside]
        if len(self.running) + sum(other.claims for other in (query, *others)) > self.max_rows:
            return None
        reserved = sum(self._reserved(other.prompt, other.sampling) for other in (query, *others))
        if self._running_tokens() + reserved > self._model.max_tokens:
            return None
        if self._prefixes.learns(query.prompt, [other.prompt for other in others]):
            return None  # a shared prefix is read once
        self._reading = self.waiting.popleft()
        if self._mixing is not None and beside:
            self._mixing.area = self._mixing.new_area()
        self._model.begin()
        self._read = 0 if query.prompt_logprobs else self._prefixes.restore(self._model, query.prompt)
        return query

    def _take_all(self, parts: Sequence[_Part], logits: Logits) -> Iterator[Query]:
        """Record that parts were read in one pass; ``logits`` are those wanted. Yields the queries whose answers begin."""
        assert self._mixing is not None
        start = 0
        for part in parts:
            self._mixing.area = part.area
            if self._take(part, logits[start : start + part.wanted]):
                yield part.query
            start += part.wanted
        self._mixing.release_others()

    def _take(self, part: _Part, logits: Logits) -> bool:
        """Record that a part was read; ``logits`` are those wanted. Starts the answers to a prompt that is read completely, and
        returns whether it was."""
        query = part.query
        if query.prompt_logprobs:
            following = query.prompt[part.start + 1 : part.start + len(part.ids) + 1]
            try:
                for token, values in zip(following, logits):
                    query.of_prompt.append(token_logprob(token, values, query.sampling.logprobs or 0))
            except NoNumberError as error:
                query.error = error
        if part.whole and query.error is None:
            self._prefixes.store(self._model, query.prompt)
            self._answer(query, logits[-1].copy())
        return part.whole

    def _answer(self, query: Query, logits: Logits) -> None:
        """Begin the answers to a prompt that was read; ``logits``, [vocabulary], are of their first tokens."""
        sampling = query.sampling
        reserved = self._running_tokens() + self._reserved(query.prompt, sampling)
        if sampling.num_beams > 1:
            self._begin_beams(query, logits, reserved)
            return
        for number in range(sampling.candidates):
            constraint = query.constraints[number] if query.constraints else None
            sampler = Sampler(sampling, query.prompt, number, ends=self._task.eos_token_ids, constraint=constraint)
            stream = StreamText(self._tokenizer.text_decoder, sampling.stop, sampling.min_new_tokens)
            lookup = None if self._mixing is None else PromptLookup(query.prompt)
            answer = Answer(query, number, sampler, stream, constraint, lookup=lookup)
            query.answers.append(answer)
            if sampling.max_new_tokens:
                self._extend(answer, logits)
            else:  # only the prompt's log-probabilities are wanted
                answer.finish = "length"
            if query.error is not None:
                self._remove_finished()
                return
            if answer.finish is None:
                self._model.admit(reserved)
                self.running.append(answer)

    def _begin_beams(self, query: Query, logits: Logits, reserved: int) -> None:
        sampling = query.sampling
        most = min(sampling.max_new_tokens, self._task.max_length - len(query.prompt))
        beams = BeamSearch(sampling, self._ends(sampling), most)
        try:
            moves = beams.advance(np.repeat(logits[None], sampling.num_beams, 0))
        except NoNumberError as error:
            query.error = error
            return
        self.tokens += sampling.num_beams
        if moves is None:
            self._finish_beams(query, beams)
            return
        for number, token in enumerate(moves.tokens):
            self._model.admit(reserved)
            self.running.append(self._hypothesis(query, number, beams, [token]))

    def _hypothesis(self, query: Query, number: int, beams: BeamSearch, ids: list[int]) -> Answer:
        stream = StreamText(self._tokenizer.text_decoder)
        return Answer(query, number, Sampler(query.sampling, query.prompt), stream, beams=beams, ids=ids)

    def _advance(self, query: Query, logits: Logits) -> None:
        """Advance the beam search of a query; ``logits`` are of all rows."""
        rows = sorted(
            (row for row, a in enumerate(self.running) if a.query is query), key=lambda r: self.running[r].number
        )
        beams = self.running[rows[0]].beams
        assert beams is not None
        try:
            moves = beams.advance(logits[rows])
        except NoNumberError as error:
            query.error, moves = error, None
        self.tokens += len(rows)
        if moves is None:
            for row in rows:
                self.running[row].finish = "eos"  # it leaves
            if query.error is None:
                self._finish_beams(query, beams)
            return
        places, sources, targets = rearranged(moves.parents)
        self._model.copy([rows[i] for i in sources], [rows[i] for i in targets], len(query.prompt))
        for number, (place, token) in enumerate(zip(places, moves.tokens)):
            hypothesis = self.running[rows[place]]
            hypothesis.number, hypothesis.ids = number, [token]

    def _finish_beams(self, query: Query, beams: BeamSearch) -> None:
        """Make the best hypotheses the answers."""
        ends = self._ends(query.sampling)
        for number, found in enumerate(beams.finished[: query.sampling.n]):
            answer = self._hypothesis(query, number, beams, found.tokens.tolist())
            answer.finish = "eos" if answer.ids[-1] in ends else "length"
            answer.text = self._tokenizer.decode(answer.ids)
            answer.total_logprob = found.score
            query.answers.append(answer)

    def _extend(self, answer: Answer, logits: NDArray[np.float32]) -> None:
        """Choose the next token of an answer, and check whether it ends the answer."""
        query, sampling, ids = answer.query, answer.query.sampling, answer.ids
        if query.error is not None:
            return
        found = None
        try:
            token = answer.sampler.choose(logits)
            if sampling.logprobs is not None or sampling.candidates > sampling.n:
                found = token_logprob(token, logits, sampling.logprobs or 0)
        except DeploykitError as error:
            query.error = error
            for each in query.answers:
                each.finish = "stop"
            return
        ids.append(token)
        if answer.lookup is not None:
            answer.lookup.add([token])
        self.tokens += 1
        if found is not None:
            answer.total_logprob += found.logprob
            if sampling.logprobs is not None:
                answer.logprobs.append(found)
        answer.text += answer.stream.add(token)
        if token in self._ends(sampling):
            answer.finish = "eos"
        elif answer.stream.stopped or (answer.constraint is not None and answer.constraint.done):
            answer.finish = "stop"
        elif len(ids) >= sampling.max_new_tokens or len(query.prompt) + len(ids) >= self._task.max_length:
            answer.finish = "length"
        if answer.finish is not None:
            answer.text += answer.stream.finish()
            if answer.stream.stopped:
                answer.finish = "stop"

    def _ends(self, sampling: Sampling) -> frozenset[int]:
        """Return the tokens that end an answer."""
        own = frozenset() if sampling.ignore_eos else self._eos
        return own.union(sampling.stop_token_ids) if sampling.stop_token_ids else own

    def _remove(self, rows: Sequence[int]) -> None:
        if rows:
            if self._draft is not None:
                self._draft.forget([self.running[i] for i in rows])
            order = self._model.remove(np.array(rows, np.int64))
            self.running = [self.running[i] for i in order]

    def _remove_finished(self) -> None:
        self._remove([i for i, answer in enumerate(self.running) if answer.finish is not None])

    def _reserved(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Return the number of tokens that a prompt and its answers may take in the caches."""
        return sampling.candidates * min(len(prompt) + sampling.max_new_tokens, self._task.max_length)

    def _running_tokens(self) -> int:
        return sum(
            self._reserved(answer.query.prompt, answer.query.sampling) // answer.query.claims for answer in self.running
        )


def _for_model(parts: Sequence[_Part]) -> list[Part]:
    return [Part(part.area, part.ids, part.wanted) for part in parts]


def _part(rest: int, most: int) -> int:
    """Return the number of the ``rest`` tokens of a prompt to read now: about ``most``, a multiple of ``PREFIX_BLOCK``."""
    if rest > most:
        return most if rest > most + 1 else most - 2
    return rest - 2 if rest % _QUERY_BLOCK == 1 and rest > 1 else rest


def _named(sampling: Sampling) -> str:
    return "n" if sampling.best_of is None else "best_of"
