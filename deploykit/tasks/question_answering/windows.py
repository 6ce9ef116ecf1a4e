"""Tokenize questions and contexts, and cut them into windows for the model.

A context is tokenized once for all its questions. Positions are code points of the original context.

Source: tokenizers, ``Encoding`` and ``TruncationParams`` (windows as by its ``stride``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.errors import ArtifactError, DataError
from deploykit.tasks.question_answering.facts import QuestionAnswering

_PIECE = 200_000
"""Characters tokenized at once: the tokenizer needs a hundred times the memory of the arrays that we keep."""
_NO_WORD = -1

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class EncodedContext:
    """A context and its tokens: ids, start and end character (exclusive), and the word each is in, -1 for none.

    Arrays are int32 [tokens].
    """

    text: str
    ids: Ints
    starts: Ints
    ends: Ints
    words: Ints

    def place(self, first: int, last: int, begin: int, end: int, *, whole_words: bool) -> tuple[int, int]:
        """Return the character range of the tokens ``first`` to ``last``, in a window of the tokens ``begin`` to
        ``end``.

        ``whole_words`` extends it to whole words within the window.
        """
        if whole_words and self.words[first] != _NO_WORD and self.words[last] != _NO_WORD:
            while first > begin and self.words[first - 1] == self.words[first]:
                first -= 1
            while last + 1 < end and self.words[last + 1] == self.words[last]:
                last += 1
        return self._trimmed(int(self.starts[first]), self._end(last))

    def _end(self, token: int) -> int:
        """Return the end of a token's characters, including combining marks that the tokenizer dropped."""
        end = int(self.ends[token])
        following = int(self.starts[token + 1]) if token + 1 < len(self.starts) else len(self.text)
        while end < following and unicodedata.category(self.text[end]).startswith("M"):
            end += 1
        return end

    def _trimmed(self, start: int, end: int) -> tuple[int, int]:
        """Strip white space at both ends, which some tokenizers include in a word."""
        while start < end and self.text[start].isspace():
            start += 1
        while start < end and self.text[end - 1].isspace():
            end -= 1
        return start, end

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the first and last token of the characters ``start`` to ``end``; None if there is none."""
        within = np.flatnonzero((self.ends > start) & (self.starts < end) & (self.ends > self.starts))
        return (int(within[0]), int(within[-1])) if len(within) else None


@dataclass(frozen=True)
class Window:
    """A model input: ids and their types. The context's tokens ``begin`` to ``end`` are at ``at`` and after."""

    ids: list[int]
    types: list[int]
    at: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Template:
    """Special tokens before, between and after question and context (in the task's order), and all token types."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[int, int, int, int, int]

    @property
    def length(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


class PairTokenizer:
    """A tokenizer of questions and contexts for a model with the facts ``task``."""

    def __init__(self, tokenizer: Tokenizer, task: QuestionAnswering) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._task = task
        self._template = _template(tokenizer)

    @classmethod
    def load(cls, path: Path, task: QuestionAnswering) -> PairTokenizer:
        """Read a tokenizer.json. Raises ArtifactError."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path}: is not a tokenizer: {error}", "copy the tokenizer again") from error
        return cls(tokenizer, task)

    def for_task(self, task: QuestionAnswering) -> PairTokenizer:
        """Return the same tokenizer for a model with other facts."""
        return PairTokenizer(self._tokenizer, task)

    @property
    def marks_no_answer(self) -> bool:
        """Whether windows begin with a special token, which stands for "no answer"."""
        return bool(self._template.before)

    def question(self, text: str) -> list[int]:
        """Return the question's tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def context(self, text: str) -> EncodedContext:
        """Tokenize a context. One of more than 200,000 characters is tokenized in pieces, cut at white space."""
        columns: list[list[Ints]] = [[], [], [], []]
        words = 0
        for begin, end in _pieces(text):
            encoding = self._tokenizer.encode(text[begin:end], add_special_tokens=False)
            offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(begin)
            _restore_first_letters(text, begin, offsets)
            of_words = np.array([_NO_WORD if w is None else w for w in encoding.word_ids], np.int32)
            of_words[of_words != _NO_WORD] += words
            words = int(of_words.max(initial=words - 1)) + 1
            for column, values in zip(
                columns, (np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1], of_words)
            ):
                column.append(values)
        return EncodedContext(text, *(np.concatenate(column) for column in columns))

    def room(self, question: Sequence[int]) -> int:
        """Return the number of context tokens that fit a window with the question."""
        return self._task.max_length - self._template.length - len(question)

    def check(self, question: Sequence[int], context: EncodedContext) -> None:
        """Raise DataError, with the lengths, if the question leaves too little room in a window."""
        room, window = self.room(question), self._task.max_length
        if room < 1:
            raise DataError(
                f"the question has {len(question)} tokens, and a window of {window} has room for "
                f"{window - self._template.length - 1}",
                "shorten the question, or train with a larger --max-length",
            )
        if room < len(context.ids) and self._task.doc_stride >= room:
            raise DataError(
                f"the question's {len(question)} tokens leave {room} of a window's {window} for the context, and windows "
                f"share {self._task.doc_stride}",
                "shorten the question, or train with a larger --max-length or a smaller --doc-stride",
            )

    def windows(self, question: Sequence[int], context: EncodedContext) -> Iterator[Window]:
        """Cut the windows of a question that ``check`` accepts; neighbours share ``doc_stride`` tokens of the
        context."""
        room, total = self.room(question), len(context.ids)
        begin = 0
        while True:
            end = min(begin + room, total)
            yield self._window(list(question), context.ids[begin:end].tolist(), begin, end)
            if end == total:
                return
            begin += room - self._task.doc_stride

    def _window(self, question: list[int], part: list[int], begin: int, end: int) -> Window:
        t = self._template
        first, second = (question, part) if self._task.question_first else (part, question)
        pieces = (t.before, first, t.between, second, t.after)
        at = len(t.before) + (len(first) + len(t.between) if self._task.question_first else 0)
        return Window(
            [token for piece in pieces for token in piece],
            [kind for kind, piece in zip(t.types, pieces) for _ in piece],
            at, begin, end,
        )  # fmt: skip


def _template(tokenizer: Tokenizer) -> _Template:
    """Find the special tokens that the tokenizer adds to a pair of texts, by tokenizing two short ones."""
    encoding = next(
        (e for e in (tokenizer.encode(a, a) for a in ("a", "1", "的")) if {0, 1} <= {*e.sequence_ids}), None
    )
    if encoding is None:
        raise ArtifactError(
            "the tokenizer cannot encode a pair of texts", "use a checkpoint whose tokenizer knows letters"
        )
    members, ids, types = encoding.sequence_ids, encoding.ids, encoding.type_ids
    places = [[i for i, member in enumerate(members) if member == number] for number in (0, 1)]
    (first, *_), (*_, last) = places
    between = range(places[0][-1] + 1, places[1][0])
    spans = (range(first), places[0], between, places[1], range(last + 1, len(ids)))
    before, _, middle, _, after = ([ids[i] for i in span] for span in spans)
    kinds = [types[span[0]] if len(span) else 0 for span in spans]
    return _Template(before, middle, after, (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]))


def _restore_first_letters(text: str, begin: int, offsets: Ints) -> None:
    """Extend tokens to letters before them that belong to no token, in ``offsets``, int32 [tokens, 2], after ``begin``.

    Byte-level tokenizers that split at white space first confuse a word's first letter with the space before it. White
    space, dropped characters, and combining marks of the letter before are left alone.
    """
    covered = np.concatenate([[begin], np.maximum.accumulate(offsets[:, 1])[:-1]]) if len(offsets) else offsets[:, 1]
    gaps = np.flatnonzero(offsets[:, 0] > covered)
    if not len(gaps):
        return
    characters = np.frombuffer(text[begin : int(offsets[:, 1].max())].encode("utf-32-le", "surrogatepass"), np.uint32)
    for token in gaps[characters[offsets[gaps, 0] - 1 - begin] > ord(" ")]:
        start, least = int(offsets[token, 0]), int(covered[token])
        while start > least and _visible(text[start - 1]):
            start -= 1
        offsets[token, 0] = start


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Split a long text before white space, or else anywhere."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = begin + _PIECE
        while end > begin + _PIECE // 2 and not (text[end].isspace() and not text[end - 1].isspace()):
            end -= 1
        if end == begin + _PIECE // 2:
            end = begin + _PIECE
        yield begin, end
        begin = end
    yield begin, len(text)


def _visible(character: str) -> bool:
    """Return whether a character is a letter, digit, punctuation mark or symbol."""
    return not character.isspace() and unicodedata.category(character)[0] not in "CM"
