"""Tokenize for translation without transformers, with the same ids and texts as Hugging Face's tokenizers.

There are two backends. MarianMT and M2M100 split with SentencePiece and look pieces up in a separate vocabulary; NLLB
and T5 use a tokenizer.json. Everything else that differs between families (language codes, task prefixes, special
tokens) is data, which ``export_tokenizer`` reads from the checkpoint's tokenizer and writes as a ``TokenizerRecord``.

Source: transformers 5, tokenization_python.py, tokenization_marian.py, tokenization_m2m_100.py,
tokenization_nllb.py, tokenization_t5.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.translation.source_prefix import prefixed, shown

RECORD = "translation_tokenizer.json"
TOKENIZER = "tokenizer.json"
SOURCE_SPM = "source.spm"
TARGET_SPM = "target.spm"
VOCABULARY = "vocab.json"
TOKENS = "tokens.json"

_REMEDY = "export the checkpoint again"
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Hugging Face's clean_up_tokenization, in its order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class TranslationTokenizer(Protocol):
    """A tokenizer. ``languages`` are the codes that ``encode`` and ``language_token`` accept, empty for one pair."""

    @property
    def languages(self) -> tuple[str, ...]: ...

    def encode(self, texts: Sequence[str], target: str | None = None) -> list[list[int]]:
        """Return source token ids with special tokens and language codes, not truncated. Special tokens in a text are
        text.

        ``target`` replaces the target language that the tokenizer was loaded with. A lone surrogate becomes U+FFFD.
        Raises UsageError for a language that the checkpoint lacks.
        """

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of target token ids, without special tokens."""

    def language_token(self, code: str | None = None) -> int | None:
        """Return the id that a translation into ``code`` (default: the target loaded with) must begin with after the
        start token; None for families that name the target in the source."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the raw text before it is split into pieces.

    ``lstrip`` and ``rstrip`` consume the white space on that side; ``single_word`` tokens are not matched within words.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerRecord:
    """Everything that a checkpoint's tokenizer does besides splitting text into pieces.

    ``languages`` are the codes that have a token, put at ``language_place`` of the source: "before" it or "after" </s>.
    ``before`` are the ids that begin every source (BART's <s>). ``prefixes`` are texts put before the source, by source
    and target language, with source "" for any; ``prefix`` is for pairs without one, None if there must be one.
    ``eos_token_id`` ends every source.

    The rest is for SentencePiece only. With ``separate_models``, decoding uses another model than encoding.
    ``special_gap`` follows a special token in decoded text. ``codes_in_text`` reads a leading >>code<< if ``prefixes``
    are such codes (Marian).
    """

    backend: str
    eos_token_id: int
    languages: Mapping[str, int] = dataclasses.field(default_factory=dict)
    language_place: str | None = None
    before: tuple[int, ...] = ()
    prefixes: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    prefix: str | None = ""
    clean_up_spaces: bool = False
    split_special_tokens: bool = False
    separate_models: bool = False
    unk_token: str = "<unk>"
    added_tokens: tuple[AddedToken, ...] = ()
    special_tokens: tuple[str, ...] = ()
    special_token_ids: tuple[int, ...] = ()
    special_gap: str = ""
    codes_in_text: bool = False

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD, dataclasses.asdict(self))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_translation_tokenizer(folder: Path, source: str, target: str) -> TranslationTokenizer:
    """Return the tokenizer that ``save_translation_tokenizer`` wrote to ``folder``, for one language pair.

    Raises ArtifactError for a file that is missing or broken, UsageError for a language that a
    many-language checkpoint lacks.
    """
    record = _read_record(folder / RECORD)
    pieces = _TokenizerJson(folder, record) if record.backend == "tokenizers" else _SentencePiece(folder, record)
    return _PairTokenizer(record, pieces, source, target)


class _Pieces(Protocol):
    """Ids of texts and texts of ids, no special tokens added."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]: ...

    def texts(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


class _PairTokenizer:
    """Languages, prefixes and special tokens around a family's pieces."""

    def __init__(self, record: TokenizerRecord, pieces: _Pieces, source: str, target: str) -> None:
        self._record = record
        self._pieces = pieces
        self._target = target
        self._prefixes = record.prefixes.get(source, record.prefixes.get("", {}))
        if record.languages and source not in record.languages:
            raise self._unknown("source", source)
        if not self._knows(target) and (record.languages or record.prefix is None):
            raise self._unknown("target", target)
        code = [record.languages[source]] if record.languages else []
        self._before = [*record.before, *(code if record.language_place == "before" else [])]
        self._after = [record.eos_token_id, *(code if record.language_place == "after" else [])]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._record.languages or self._prefixes)

    def encode(self, texts: Sequence[str], target: str | None = None) -> list[list[int]]:
        prefix = self._prefix(target)
        codes = self._prefixes if self._record.codes_in_text else ()
        texts = [prefixed(t if t.isascii() else _SURROGATE.sub("\ufffd", t), prefix, codes) for t in texts]
        rows = self._pieces.ids(texts)
        return [[*self._before, *ids, *self._after] for ids in rows]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        texts = self._pieces.texts(ids)
        return [_clean_up(text) for text in texts] if self._record.clean_up_spaces else texts

    def language_token(self, code: str | None = None) -> int | None:
        return self._record.languages.get(self._checked(code))

    def _prefix(self, target: str | None) -> str:
        return self._prefixes.get(self._checked(target), self._record.prefix or "")

    def _checked(self, target: str | None) -> str:
        if target is None or target == self._target:
            return self._target
        if not self._knows(target):
            raise self._unknown("target", target)
        return target

    def _knows(self, code: str) -> bool:
        return code in (self._record.languages or self._prefixes)

    def _unknown(self, side: str, code: str) -> UsageError:
        known = shown(self.languages) or f"{self._target!r} alone"
        return UsageError(f"unknown {side} language {code!r}", f"this checkpoint knows {known}")


class _TokenizerJson:
    """A tokenizer.json, through the `tokenizers` library."""

    def __init__(self, folder: Path, record: TokenizerRecord) -> None:
        path = _existing(folder / TOKENIZER)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path}: is not a tokenizer: {error}", _REMEDY) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = record.split_special_tokens

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return list(self._tokenizer.decode_batch([list(row) for row in ids], skip_special_tokens=True))


class _SentencePiece:
    """SentencePiece with a vocabulary of its own, as transformers' PreTrainedTokenizer runs it.

    One difference is deliberate. Where added tokens overlap in a text, Hugging Face's trie can cut
    beside a token (it reads on from a stale state); here the leftmost and longest is taken. For that
    to differ, one added token must be part of another.
    """

    def __init__(self, folder: Path, record: TokenizerRecord) -> None:
        self._encoder = _load_spm(folder / SOURCE_SPM)
        self._decoder = _load_spm(folder / TARGET_SPM) if record.separate_models else self._encoder
        self._vocabulary = _read_vocabulary(folder / VOCABULARY)
        self._tokens = _read_tokens(folder / TOKENS)
        if record.unk_token not in self._vocabulary:
            raise ArtifactError(f"{folder / VOCABULARY}: has no {record.unk_token}", _REMEDY)
        self._unk_token = record.unk_token
        self._unk_id = self._vocabulary[record.unk_token]
        self._id_of = _IdCache(self._encoder, self._vocabulary, self._unk_id)
        self._unknown = self._encoder.unk_id()
        self._added = {token.content: token for token in record.added_tokens}
        self._added_pattern = _any_of(self._added) if not record.split_special_tokens else None
        self._special_tokens = frozenset(record.special_tokens)
        self._special_ids = frozenset(record.special_token_ids)
        self._special_gap = record.special_gap
        self._marian = record.codes_in_text
        self._codes_in_text = record.codes_in_text and bool(record.prefixes)

    # SentencePiece is called for one text at a time: for a list of them it starts threads, which costs more than a
    # small batch takes.

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = []
        for part in self._split(text):
            if part in self._added and self._added_pattern:
                found.append(self._vocabulary.get(part, self._unk_id))
                continue
            if self._codes_in_text and part.startswith(">>") and (end := part.find("<<")) != -1:
                found.append(self._vocabulary.get(part[: end + 2], self._unk_id))
                part = part[end + 2 :]
            own = self._encoder.encode(part, out_type=int)
            if self._unknown in own:  # the vocabulary may know the piece all the same
                pieces = self._encoder.encode(part, out_type=str)
                found += [self._vocabulary.get(piece, self._unk_id) for piece in pieces]
            else:
                found += [self._id_of[i] for i in own]
        return found

    def _split(self, text: str) -> list[str]:
        """Split ``text`` at its added tokens, each of which takes what its flags say from its neighbours."""
        if self._added_pattern is None or not self._added_pattern.search(text):
            return [text]
        parts = [part for part in self._added_pattern.split(text) if part]
        for i, part in enumerate(parts):
            token = self._added.get(part)
            if token is None:
                continue
            left, right = parts[i - 1] if i else "", parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = right.lstrip()
            if token.lstrip and left:
                parts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[i - 1] += part
                parts[i] = ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1] = part + parts[i + 1]
                parts[i] = ""
        return [part for part in parts if part]

    def texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self._text(row) for row in ids]

    def _text(self, ids: Sequence[int]) -> str:
        """Return the text of a row of ids. Pieces between two special tokens are joined by themselves."""
        text: str = ""
        run: list[str] = []
        for i in ids:
            if i in self._special_ids:
                continue
            token = self._tokens[i] if 0 <= i < len(self._tokens) else self._unk_token
            if token in self._special_tokens:
                text += self._decoder.decode(run) + token + self._special_gap
                run = []
            else:
                run.append(token)
        text += self._decoder.decode(run)
        # Pieces that the decoding model lacks keep their sign for a space; Marian's tokenizer, alone, replaces it.
        if self._marian:
            text = text.replace("▁", " ")
        return text.strip()


class _IdCache(dict[int, int]):
    """A cache from the encoding SentencePiece model's ids to vocabulary ids, filled on first use.

    The model's ids avoid creating a string for each piece, and a model has tens of thousands of pieces.
    """

    def __init__(self, encoder: SentencePieceProcessor, vocabulary: Mapping[str, int], unk_id: int) -> None:
        super().__init__()
        self._encoder, self._vocabulary, self._unk_id = encoder, vocabulary, unk_id

    def __missing__(self, own: int) -> int:
        self[own] = found = self._vocabulary.get(self._encoder.id_to_piece(own), self._unk_id)
        return found


def _any_of(tokens: Mapping[str, AddedToken]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if tokens else None


def _clean_up(text: str) -> str:
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file", _REMEDY)
    return path


def _load_spm(path: Path) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_existing(path).read_bytes())
        return processor
    except (RuntimeError, OSError) as error:
        raise ArtifactError(f"{path}: is not a SentencePiece model: {error}", _REMEDY) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: is not JSON: {error}", _REMEDY) from error


def _read_vocabulary(path: Path) -> dict[str, int]:
    value = _read_json(path)
    if not isinstance(value, dict) or not all(isinstance(i, int) for i in value.values()):
        raise ArtifactError(f"{path}: is not a vocabulary (pieces with their ids)", _REMEDY)
    return value


def _read_tokens(path: Path) -> list[str]:
    value = _read_json(path)
    if not isinstance(value, list) or not all(isinstance(token, str) for token in value):
        raise ArtifactError(f"{path}: is not a list of tokens", _REMEDY)
    return value


def _read_record(path: Path) -> TokenizerRecord:
    value = _read_json(path)
    try:
        value["before"] = tuple(value.get("before", ()))
        value["added_tokens"] = tuple(AddedToken(**token) for token in value["added_tokens"])
        record = TokenizerRecord(**value)
    except (AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is not a tokenizer's record: {error}", _REMEDY) from error
    if record.backend not in ("sentencepiece", "tokenizers"):
        raise ArtifactError(f"{path}: unknown backend {record.backend!r}", "upgrade deploykit")
    return record
