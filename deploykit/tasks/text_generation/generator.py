"""Answer prompts with any language model: token ids in, texts out. Neither torch nor transformers is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.runtime.engines.causal_lm import CausalLm
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.decoder import Decoder, Finish, Query
from deploykit.tasks.text_generation.draft import Draft, DraftLm
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.grammar import Grammars
from deploykit.tasks.text_generation.logprobs import log_sum

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text to continue, the messages of a dialog to answer, or an object of such ``messages`` and of ``tools``."""

_CHUNK = 512
"""Maximum number of tokens of a row that one call reads: their logits over the whole vocabulary are in memory at once."""


@dataclass(frozen=True)
class Generated:
    """One answer. ``tokens`` counts the generated ones, the end token included. ``finish`` is "length" where
    ``max_new_tokens`` or the context ended it. ``logprobs`` has a record for each token (``TokenLogprob.record``), if
    ``Sampling.logprobs`` requests them."""

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()


class TextGenerator(Protocol):
    """A language model that answers: a checkpoint, an export, or a served model. ``has_template``: it takes dialogs."""

    @property
    def task(self) -> TextGeneration: ...

    @property
    def has_template(self) -> bool: ...

    def reply(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, *, progress: Callable[[int], None] = ...
    ) -> list[list[Generated] | DataError]:
        """Return ``sampling.n`` answers to each prompt, in order, or why the prompt alone is refused. ``progress`` is
        called with the number of answers that arrived."""

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield the pieces of one answer as they arrive. Raises DataError for a prompt that is refused."""

    def answer_logprobs(self, prompts: Sequence[Prompt], answer: Sequence[int]) -> list[float]:
        """Return the log-probability of the tokens of ``answer`` after each prompt. An empty text stands for the beginning
        of any text."""

    def close(self) -> None: ...


def as_prompt(generator: TextGenerator, prompt: Prompt, system: str | None = None) -> Prompt:
    """Return a text as the user's message, after the ``system`` message, where the model has a chat template."""
    if not isinstance(prompt, str) or not generator.has_template:
        return prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


@dataclass(frozen=True)
class RowScore:
    """``logprobs`` float32 [supervised tokens] of one row, and whether each was the likeliest token (``best``)."""

    logprobs: NDArray[np.float32]
    best: NDArray[np.bool_]


class LocalGenerator:
    """A language model in this process. ``draft``: a smaller one that guesses its tokens."""

    def __init__(
        self, task: TextGeneration, tokenizer: ChatTokenizer, model: CausalLm, draft: DraftLm | None = None
    ) -> None:
        self.task, self.tokenizer, self.model, self.draft = task, tokenizer, model, draft
        self.grammars = Grammars(tokenizer.tokenizer, task.vocabulary, task.eos_token_ids)
        self._new_decoder()

    def _new_decoder(self) -> None:
        draft = None if self.draft is None else Draft(self.draft)
        self.decoder = Decoder(self.model, self.task, self.tokenizer, draft)

    @property
    def has_template(self) -> bool:
        return self.tokenizer.template is not None

    def close(self) -> None:
        """Do nothing: the model is freed with the object."""

    def reply(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Generated] | DataError]:
        """Return the answers to each prompt, or why it is refused; see ``TextGenerator``."""
        encoded = [self._encoded(prompt, sampling) for prompt in prompts]
        accepted = [ids for ids in encoded if not isinstance(ids, DataError)]
        answers = iter(self.try_generate(accepted, sampling, progress=progress))
        return [ids if isinstance(ids, DataError) else next(answers) for ids in encoded]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield the pieces of one answer as they arrive. Raises DataError for a prompt that is refused."""
        sampling = sampling or self.task.sampling
        ids = self.prompt_ids(prompt)
        query = self.query(ids, sampling)
        self.decoder.add(query)
        sent = 0
        try:
            while not self.decoder.idle:
                self.decoder.step()
                for answer in query.answers:
                    if len(answer.text) > sent:
                        yield answer.text[sent:]
                        sent = len(answer.text)
            if query.error is not None:
                raise query.error
        except GeneratorExit:  # the caller stopped reading
            query.cancelled = True
            self.decoder.step()
            raise
        except BaseException:
            self._new_decoder()
            raise

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens. Raises DataError if the chat template refuses it."""
        if isinstance(prompt, Mapping):
            return self.tokenizer.encode_prompt(prompt["messages"], prompt.get("tools"))
        return self.tokenizer.encode_prompt(prompt)

    def _encoded(self, prompt: Prompt, sampling: Sampling | None) -> list[int] | DataError:
        try:
            ids = self.prompt_ids(prompt)
            self.check(ids, sampling)
        except DataError as error:
            return error
        return ids

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling | None = None,
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Generated]]:
        """Return ``sampling.n`` answers to each prompt, in order. ``progress`` is called with the answers that arrived.

        Raises DataError for a prompt that is empty or leaves no room in the context for an answer, or for which the model
        computes no number.
        """
        return [generated(query, self.tokenizer) for query in self._run(prompts, sampling, progress)]

    def try_generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling | None = None,
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Generated] | NoNumberError]:
        """Return the same as ``generate``, but the error of a prompt for which the model computes no number."""
        return [
            query.error if isinstance(query.error, NoNumberError) else generated(query, self.tokenizer)
            for query in self._run(prompts, sampling, progress)
        ]

    def _run(
        self, prompts: Sequence[list[int]], sampling: Sampling | None, progress: Callable[[int], None]
    ) -> list[Query]:
        """Return the queries of all prompts, done."""
        sampling = sampling or self.task.sampling
        queries = [self.query(prompt, sampling) for prompt in prompts]
        for query in queries:
            self.decoder.add(query)
        try:
            while not self.decoder.idle:
                for query in self.decoder.step(steadily=False):
                    progress(len(query.answers))
        except BaseException:
            self._new_decoder()  # its queries must not reach the next call
            raise
        return queries

    def check(self, prompt: Sequence[int], sampling: Sampling | None = None) -> None:
        """Raise DataError for a prompt that cannot be answered."""
        self.decoder.check(prompt, sampling or self.task.sampling)

    def query(self, prompt: Sequence[int], sampling: Sampling, **more: Any) -> Query:
        """Return a query for the decoder. Raises DataError as ``check`` does, and UsageError for sampling options that
        do not fit the model, or that no text can match."""
        self.check(prompt, sampling)
        constraints = [self.grammars.constraint(sampling) for _ in range(sampling.candidates)]
        return Query(prompt, sampling, [found for found in constraints if found is not None], **more)

    def score(self, rows: Sequence[EncodedRow]) -> Iterator[RowScore]:
        """Return the log-probabilities of each row's supervised tokens, in order."""
        for row, logits in zip(rows, self.supervised_logits(rows)):
            targets = row.ids[1:][row.supervised[1:]]
            chosen = logits[np.arange(len(targets)), targets]
            yield RowScore(chosen - log_sum(logits), logits.argmax(1) == targets)

    def answer_logprobs(self, prompts: Sequence[Prompt], answer: Sequence[int]) -> list[float]:
        """Return the log-probability of an answer's tokens after each prompt; see ``TextGenerator``."""
        rows = []
        for prompt in prompts:
            ids = self.prompt_ids(prompt) or list(self.task.eos_token_ids[:1])
            rows.append(EncodedRow.of_answer(ids, answer))
        found = [float(score.logprobs.sum()) for score in self.score(rows)]
        if not all(map(math.isfinite, found)):
            raise NoNumberError
        return found

    def supervised_logits(self, rows: Sequence[EncodedRow]) -> Iterator[NDArray[np.float32]]:
        """Return for each row the logits that predict its supervised tokens, float32 [supervised, vocabulary]."""
        for row in rows:
            # A logit predicts the token after its own.
            wanted = np.append(row.supervised[1:], False)
            self.model.begin()
            found = []
            for start in range(0, len(row.ids), _CHUNK):
                part = slice(start, start + _CHUNK)
                places = np.flatnonzero(wanted[part]).tolist()
                found.append(self.model.feed(row.ids[part].tolist(), places).copy())
            yield np.concatenate(found)


def generated(query: Query, tokenizer: ChatTokenizer) -> list[Generated]:
    """Return the answers of a query that is done. Raises its error, if it has one."""
    if query.error is not None:
        raise query.error
    answers = []
    for answer in query.kept():
        assert answer.finish is not None
        answers.append(
            Generated(
                answer.text,
                answer.finish,
                len(query.prompt),
                len(answer.ids),
                tuple(answer.ids),
                tuple(found.record(tokenizer) for found in answer.logprobs),
            )
        )
    return answers
