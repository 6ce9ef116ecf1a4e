"""Detokenize an answer token by token. The joined pieces are the text that all tokens together decode to.

The method depends on the tokenizer's decoder (its JSON in tokenizer.json):

- ``bytes``: byte-level. The text is the UTF-8 of all tokens' bytes, so an incremental UTF-8 decoder is exact.
- ``tokens``: a token's text depends on whether any text comes before it (Metaspace drops the first space, WordPiece
  writes none), and a run of byte tokens is decoded as one (byte fallback: one bad byte spoils the run). The first
  tokens are decoded alone until they give text, each later piece behind an anchor, a token whose own text is known.
  A piece is one token, or a run of byte tokens and the token after it.
- ``whole``: any other decoder, where a later token can change earlier text. All text comes at the end.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer

from deploykit.errors import ArtifactError
from deploykit.runtime.stop_search import StopSearch

_LOCAL = ("Replace", "Strip", "ByteFallback", "Metaspace", "WordPiece")
"""Decoders that decode each token separately, except the first token and runs of byte tokens."""


class StreamText:
    """The text of one answer, as its tokens arrive.

    The answer is cut at the earliest position where any of the ``stop`` strings begins, however the text is split
    into tokens. Stop strings that are complete within the first ``min_tokens`` tokens are ignored, as in vLLM.
    """

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stream = decoder.stream()
        self._whole = decoder.kind == "whole"
        self._stop = tuple(stop)
        self._search = StopSearch(self._stop)
        self._ignored = min_tokens
        self._settled = 0
        """Length of the text in which stop strings are ignored, where the text is decoded as a whole."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed: the answer ends before it."""
        return self._search.stopped

    def add(self, token_id: int) -> str:
        """Return the text that is final now: never half a character, nor a part of a stop string that may still be
        completed."""
        if self.stopped:
            return ""
        may_stop = self._ignored <= 0
        self._ignored -= 1
        text = self._stream.add(token_id)
        if not self._whole:
            return self._search.add(text, may_stop=may_stop)
        if may_stop and self._stop:
            text = self._searched_again()
            return text if self.stopped else ""
        if self._stop:
            self._settled = len(self._stream.finish())
        return ""

    def finish(self) -> str:
        """Return the remaining text after the last token."""
        if self.stopped:
            return ""
        may_stop = self._ignored < 0
        text = self._searched_again() if self._whole else self._search.add(self._stream.finish(), may_stop=may_stop)
        return text + self._search.finish()

    def _searched_again(self) -> str:
        text = self._stream.finish()
        self._search = StopSearch(self._stop)
        settled = self._search.add(text[: self._settled], may_stop=False)
        return settled + self._search.add(text[self._settled :])


class _Stream(Protocol):
    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class TokenDecoder:
    """Decode a tokenizer's ids, special tokens left out, at once or as a stream."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> _Stream:
        if self.kind == "bytes":
            return _Bytes(self)
        return _Tokens(self) if self.kind == "tokens" else _Whole(self)

    @cached_property
    def kind(self) -> Literal["bytes", "tokens", "whole"]:
        decoder = self.tokenizer.decoder
        if decoder is None:
            return "tokens"  # tokens joined by spaces
        record = json.loads(decoder.__getstate__())
        steps: list[Mapping[str, Any]] = record["decoders"] if record["type"] == "Sequence" else [record]
        names = [step["type"] for step in steps]
        if names == ["ByteLevel"]:
            return "bytes"
        fused = names.index("Fuse") if "Fuse" in names else len(names)
        local = all(name in _LOCAL for name in names[:fused])
        # Only the beginning of the text may be stripped, which affects only the first piece.
        strips = all(step["type"] == "Strip" and step["stop"] == 0 for step in steps[fused + 1 :])
        return "tokens" if local and strips else "whole"

    @cached_property
    def anchor(self) -> tuple[int, int]:
        """The id of an ordinary token, and the length of its text at the beginning."""
        for token_id in range(self.tokenizer.get_vocab_size()):
            text = self([token_id])
            if text.isascii() and text.isalnum() and self([token_id, token_id]).startswith(text):
                return token_id, len(text)
        raise ArtifactError("tokenizer.json: no token is a letter or a digit", "copy the tokenizer again")

    def single(self, token_id: int) -> tuple[str, bytes]:
        """Return one token's text, special tokens included, and its bytes. The text has U+FFFD for a part of a
        character; the bytes of a byte-level token are exact."""
        text = str(self.tokenizer.decode([token_id], skip_special_tokens=False))
        token = self.tokenizer.id_to_token(token_id)
        return text, _bytes(token) if self.kind == "bytes" and token is not None else text.encode()

    def token(self, token_id: int) -> str | None:
        """Return the token as the vocabulary writes it; None for a token without text."""
        token = self.tokenizer.id_to_token(token_id)
        return None if token is None or token in self._special else str(token)

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special)


class _Bytes:
    """Byte-level: the decoder waits for the rest of a character, at most three bytes."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._token = decoder.token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        token = self._token(token_id)
        return "" if token is None else self._utf8.decode(_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Tokens:
    """``_pending``: tokens whose text has not been returned yet; ``_begun``: whether any text has been returned."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._pending: list[int] = []
        self._begun = False

    def add(self, token_id: int) -> str:
        token = self._decoder.token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        return "" if _is_byte(token) else self.finish()

    def finish(self) -> str:
        if not self._begun:
            text = self._decoder(self._pending)
            if not text:
                return ""
            self._begun = True
        else:
            anchor, length = self._decoder.anchor
            text = self._decoder([anchor, *self._pending])[length:]
        self._pending.clear()
        return text


class _Whole:
    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        return self._decoder(self._ids)


def _bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:  # an added token is text as it is
        return token.encode()


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_table() -> dict[str, int]:
    """Return the character that stands for each byte in a byte-level vocabulary, as in GPT-2's ``bytes_to_unicode``."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_table()
