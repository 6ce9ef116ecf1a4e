"""Turn dialogs into token ids, and mark those that are supervised. Neither torch nor transformers is needed.

The rendered text is encoded without special tokens of the tokenizer's own: the template has written them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from deploykit.errors import ArtifactError, DataError, UsageError
from deploykit.freed_memory import return_memory
from deploykit.runtime.stream_text import TokenDecoder
from deploykit.tasks.text_generation.chat_template import FILE, ChatTemplate, Message
from deploykit.tasks.text_generation.rows import Row
from deploykit.text import without_surrogates

LossOn = Literal["completion", "last-turn", "all"]
OnLong = Literal["drop", "truncate", "split", "error"]


@dataclass(frozen=True)
class EncodedRow:
    """``ids`` int64 [tokens]; ``supervised`` bool [tokens], by position: whether the loss counts the token.

    ``rewritten``: answers of earlier turns that are not supervised, because the template rewrites them when the
    dialog continues (for example without their reasoning), so that the model never has to write them like that.
    ``joined``: whether the first token of an answer begins in the prompt, so that it is not supervised.
    """

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    rewritten: int = 0
    joined: bool = False

    @classmethod
    def of_answer(cls, prompt: Sequence[int], answer: Sequence[int]) -> EncodedRow:
        """Return the tokens of a prompt and of its answer; only the answer is supervised."""
        return cls(np.array([*prompt, *answer], np.int64), np.arange(len(prompt) + len(answer)) >= len(prompt))


class ChatTokenizer:
    """A checkpoint's tokenizer and its chat template, if it has one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.template = None if template is None else ChatTemplate(template, special_tokens)
        self.eos_token_ids = tuple(eos_token_ids)
        self.text_decoder = TokenDecoder(tokenizer)

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str], eos_token_ids: Sequence[int]) -> ChatTokenizer:
        """Read tokenizer.json and, if there is one, the chat template of an export."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path}: is not a tokenizer: {error}", "copy the tokenizer again") from error
        return_memory()  # 17 MB for a vocabulary of 49,152
        template = folder / FILE
        source = template.read_text(encoding="utf-8") if template.is_file() else None
        return cls(tokenizer, source, special_tokens, eos_token_ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text, and may end a turn."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) | {*self.eos_token_ids}

    def encode_prompt(
        self, messages: Sequence[Message] | str, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the ids of a prompt: a dialog that the model answers, or a plain text that it continues.

        Raises DataError when the template refuses the dialog, or would leave out tools or their calls.
        """
        if isinstance(messages, str):
            return self._prompt_ids(messages)
        text = self._chat().render(messages, add_generation_prompt=True, tools=tools)
        return self._prompt_ids(text, add_special_tokens=False)

    def placed(self, prompt: Sequence[Message] | str) -> tuple[str, list[int], list[tuple[int, int]]]:
        """Return a prompt's text, the ids of ``encode_prompt``, and each token's position in the text."""
        plain = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._chat().render(prompt, add_generation_prompt=True)
        encoding = self._encode(text, add_special_tokens=plain)
        return text, list(encoding.ids), list(encoding.offsets)

    @cached_property
    def text_decoder(self) -> TokenDecoder:
        return TokenDecoder(self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        return self.text_decoder(ids)

    def encode_row(self, row: Row, loss_on: LossOn = "completion") -> EncodedRow:
        """Return the ids of a row to train on or to measure. Raises DataError when the template refuses the dialog."""
        if row.text is not None:
            ids = [*self._encode(row.text).ids, *self.eos_token_ids[:1]]
            return EncodedRow(np.array(ids, np.int64), np.ones(len(ids), bool))
        text = self._chat().render(row.messages, tools=row.tools)
        encoding = self._encode(text, add_special_tokens=False)
        supervised = np.full(len(encoding.ids), loss_on == "all")
        rewritten, joined = 0, False
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if loss_on == "all":
            for i in answers:
                if not _is_learned(row.messages[i]):
                    tokens = self._answer(row, i, text, encoding)
                    supervised[tokens or slice(0)] = False
            return EncodedRow(np.array(encoding.ids, np.int64), supervised)
        for i in answers if loss_on == "completion" else answers[-1:]:
            if not _is_learned(row.messages[i]):
                continue
            tokens = self._answer(row, i, text, encoding)
            if tokens is None:
                rewritten += 1
            else:
                supervised[tokens] = True
                start = len(self._prompt(row, i))
                joined |= any(a < start < b for a, b in encoding.offsets)
        return EncodedRow(np.array(encoding.ids, np.int64), supervised, rewritten, joined)

    def _prompt(self, row: Row, index: int) -> str:
        """Return the prompt that the model would be given to write the answer ``index``."""
        return self._chat().render(row.messages[:index], add_generation_prompt=True, tools=row.tools)

    def _answer(self, row: Row, index: int, text: str, encoding: Encoding) -> slice | None:
        """Return the tokens of ``text``, a rendered dialog, that are the answer ``index`` and the end of its turn: after the
        prompt that the model would be given for it. None where the text does not begin with that prompt."""
        chat = self._chat()
        prompt = self._prompt(row, index)
        answered = chat.render(row.messages[: index + 1], tools=row.tools)
        if not answered.startswith(prompt):
            return None
        # Phi-3's template ends a turn with one token, and a dialog that does not continue with another token after it.
        ends = (self._end_of_turn(row, index, answered), len(answered))
        found = [
            self._tokens(encoding, len(prompt), end) for end in dict.fromkeys(ends) if text.startswith(answered[:end])
        ]
        ended = (
            tokens for tokens in found if encoding.ids[tokens][-1:] and encoding.ids[tokens][-1] in self.special_ids
        )
        return next(ended, found[-1] if found and text.startswith(answered) else None)

    def _end_of_turn(self, row: Row, index: int, answered: str) -> int:
        """Return the position up to which ``answered``, the dialog up to an answer, does not change when the dialog continues."""
        try:
            going_on = self._chat().render(row.messages[: index + 1], add_generation_prompt=True, tools=row.tools)
        except DataError:  # it wants another role's message next
            return len(answered)
        equal = (a == b for a, b in zip(answered, going_on))
        return next((i for i, same in enumerate(equal) if not same), min(len(answered), len(going_on)))

    def _tokens(self, encoding: Encoding, start: int, end: int) -> slice:
        """Return the tokens of characters ``start`` to ``end``, up to the token that ends the turn."""
        offsets = encoding.offsets
        first = next((i for i, (a, b) in enumerate(offsets) if a >= start and b > start), len(offsets))
        after = next((i for i in range(first, len(offsets)) if offsets[i][1] > end), len(offsets))
        # Templates write white space after the token that ends a turn: the model need not write it.
        last = next((i for i in range(after - 1, first - 1, -1) if encoding.ids[i] in self.special_ids), after - 1)
        return slice(first, last + 1)

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        return self.tokenizer.encode(without_surrogates(text), add_special_tokens=add_special_tokens)

    def _prompt_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # Of a batch, since a long text takes a second and Python's other threads run meanwhile; fast: without offsets.
        texts = [without_surrogates(text)]
        return list(self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)[0].ids)

    def _chat(self) -> ChatTemplate:
        if self.template is None:
            raise UsageError(
                "the checkpoint has no chat template, and dialogs need one",
                "give plain texts (a column text), or fine-tune it with --chat-template",
            )
        return self.template


def _is_learned(message: Message) -> bool:
    """Return whether an answer is learned: not if it has the weight 0, as OpenAI's files mark answers to leave out."""
    return bool(message.get("weight", 1) != 0)


def fit(row: EncodedRow, max_length: int, on_long: OnLong) -> list[EncodedRow]:
    """Return the parts of a row that are no longer than ``max_length``: none for ``drop``, its beginning for
    ``truncate``, all of it in pieces for ``split``. Parts without a supervised token are left out."""
    if len(row.ids) <= max_length:
        parts = [row]
    elif on_long in ("drop", "error"):
        parts = []
    else:
        starts = range(0, len(row.ids) if on_long == "split" else 1, max_length)
        parts = [EncodedRow(row.ids[i : i + max_length], row.supervised[i : i + max_length]) for i in starts]
    return [part for part in parts if part.supervised[1:].any()]  # nothing comes before the first token to predict it
