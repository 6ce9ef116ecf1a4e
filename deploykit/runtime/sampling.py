"""The sampling options of a language model or a request, and how a request overrides a model's. No numpy: every command
reads them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.errors import UsageError

_MOST_ANSWERS = 128
_MOST_STOPS = 1024
_MOST_STOP_CHARS = 100_000
_TOKEN_DIGITS = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Sampling:
    """Sampling options. ``temperature`` 0 is greedy search; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``typical_p`` 1
    are off.

    ``logit_bias``: pairs of a token id and what is added to its logit. ``repetition_penalty`` divides the positive
    logits of tokens in the prompt or the answer, and multiplies the negative ones. ``presence_penalty`` and
    ``frequency_penalty`` are subtracted from the logits of tokens in the answer, once and once per occurrence.
    ``stop``: texts that end an answer, and are cut off; ``stop_token_ids``: tokens that end it as the model's own end
    tokens do, even with ``ignore_eos``. Within the first ``min_new_tokens`` none of these ends the answer.
    ``num_beams`` above 1 is beam search, with ``length_penalty`` and ``early_stopping`` as Hugging Face defines them.
    ``n``: answers to each prompt, the likeliest per token of ``best_of`` if that is given. ``logprobs``: number of
    likeliest tokens to report at each position, besides the chosen one; None reports nothing.

    At most one of ``json_schema`` (True: any JSON object), ``regex``, ``choice`` and ``grammar`` (Lark) is given: the
    answer then matches it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    n: int = 1
    typical_p: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    json_schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Sampling:
        """Read what ``dataclasses.asdict`` gave, after JSON: its tuples are lists, and an earlier version wrote fewer
        fields."""
        lists = {name: tuple(record.get(name, ())) for name in ("stop", "stop_token_ids", "choice")}
        bias = tuple((int(token), float(value)) for token, value in record.get("logit_bias", ()))
        return cls(**{**record, **lists, "logit_bias": bias})

    def parameters(self, default: Sampling) -> dict[str, Any]:
        """Return the values that differ from ``default``, as JSON, for ``override``."""
        own = dataclasses.asdict(default)
        given = {name: value for name, value in dataclasses.asdict(self).items() if value != own[name]}
        if "logit_bias" in given:
            given["logit_bias"] = {str(token): value for token, value in self.logit_bias}
        return given

    @property
    def candidates(self) -> int:
        """Number of rows of a prompt: the answers to generate, of which ``n`` are kept, or the beams."""
        return max(self.n, self.best_of or 0, self.num_beams)

    @property
    def structure(self) -> str | None:
        """Names of ``STRUCTURES`` that constrain the answer. The JSON schema {} is a constraint: any JSON value matches."""
        return next((name for name in STRUCTURES if getattr(self, name) not in (None, ())), None)

    def check_tokens(self, vocabulary: int) -> None:
        """Raise UsageError for a token id that is not in the model's ``vocabulary``."""
        for name, ids in (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in ids:
                if token >= vocabulary:
                    raise UsageError(
                        f"{name} names token {token}, and the model has {vocabulary:,} tokens",
                        f"give ids from 0 to {vocabulary - 1}",
                    )


_RANGES: Mapping[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1_000_000),
    "min_new_tokens": (0, 1_000_000),
    "temperature": (0, 100),
    "top_k": (0, 1_000_000_000),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "typical_p": (1e-6, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "seed": (0, 2**63 - 1),
    "n": (1, _MOST_ANSWERS),
    "best_of": (1, _MOST_ANSWERS),
    "num_beams": (1, _MOST_ANSWERS),
    "length_penalty": (-10, 10),
    "logprobs": (0, 20),
}
_FRACTIONS = (
    "length_penalty", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip
PARAMETERS = tuple(field.name for field in dataclasses.fields(Sampling))
"""Request parameters and command line options."""
ALIASES: Mapping[str, str] = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
"""Names of vLLM and OpenAI -> Hugging Face's."""
STRUCTURES = ("json_schema", "regex", "choice", "grammar")
"""Parameters that constrain an answer; a request has at most one of them."""


def override(default: Sampling, given: Mapping[str, Any]) -> Sampling:
    """Return ``default`` with the ``given`` values. Raises UsageError naming the first that is unknown or out of
    range."""
    changes: dict[str, Any] = {}
    for written, value in given.items():
        name = ALIASES.get(written, written)
        if name not in PARAMETERS:
            raise UsageError(f"unknown parameter {written}", f"known ones: {', '.join((*PARAMETERS, *ALIASES))}")
        if name in changes:
            raise UsageError(f"{name} is given twice, also as {written}", "give one of them")
        changes[name] = _checked(written, name, value)
    structures = [name for name in STRUCTURES if changes.get(name) not in (None, ())]
    if len(structures) > 1:
        raise UsageError(f"{' and '.join(structures)} exclude each other", "give one of them")
    if structures:  # it replaces the default's
        changes = {**{name: getattr(Sampling(), name) for name in STRUCTURES}, **changes}
    found = dataclasses.replace(default, **changes)
    if found.best_of is not None and found.best_of < found.n:
        raise UsageError(f"best_of is {found.best_of}, and n is {found.n}", "give a best_of of at least n")
    _check_beams(found)
    if found.min_new_tokens > found.max_new_tokens:
        raise UsageError(
            f"min_new_tokens is {found.min_new_tokens}, and max_new_tokens is {found.max_new_tokens}",
            "give a smaller min_new_tokens",
        )
    return found


def _check_beams(found: Sampling) -> None:
    """Raise UsageError for options that cannot be combined with beam search."""
    if found.num_beams == 1:
        return
    if found.n > found.num_beams:
        raise UsageError(f"n is {found.n}, and num_beams is {found.num_beams}", "give an n of at most num_beams")
    plain = Sampling()
    with_beams = ("max_new_tokens", "min_new_tokens", "n", "num_beams", "length_penalty", "early_stopping", "stop_token_ids",
                  "ignore_eos", "seed")  # fmt: skip
    for name in PARAMETERS:
        if name not in with_beams and getattr(found, name) != getattr(plain, name):
            own = getattr(plain, name)
            remedy = "leave one of them out"
            if own not in (None, ()):
                remedy += f", or give {name} {own:g} where the model has another"
            raise UsageError(f"num_beams cannot be combined with {name}", remedy)


def _checked(written: str, name: str, value: Any) -> Any:
    """Return the value of parameter ``name``, which the request calls ``written``."""
    if name in _RANGES:
        return None if value is None and getattr(Sampling(), name) is None else _number(written, name, value)
    if name == "early_stopping":
        if value not in (True, False, "never", "true", "false"):
            raise UsageError(f"{written} is {value!r}", 'give true, false or "never"')
        return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if name == "ignore_eos":
        if not isinstance(value, bool):
            raise UsageError(f"{written} is {value!r}", "give true or false")
        return value
    if name == "stop":
        return _stops(value)
    if name == "stop_token_ids":
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(_is_token(token) for token in value):
            raise UsageError(f"{written} is {value!r}", "give a list of token ids")
        return tuple(value)
    if name == "logit_bias":
        return _bias(value)
    return _structure(name, value)


def _number(written: str, name: str, value: Any) -> float | int:
    low, high = _RANGES[name]
    whole = name not in _FRACTIONS
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:  # false for NaN
        raise UsageError(
            f"{written} is {value!r}",
            f"give a whole number from {low} to {high}" if whole else f"give a number from {low:g} to {high:g}",
        )
    return int(value) if whole else float(value)


def _stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop holds {text!r}", "give texts that end an answer, of one character or more")
    if len(texts) > _MOST_STOPS or sum(map(len, texts)) > _MOST_STOP_CHARS:
        raise UsageError(
            f"stop holds {len(texts):,} texts of {sum(map(len, texts)):,} characters",
            f"give at most {_MOST_STOPS:,} texts of {_MOST_STOP_CHARS:,} characters together",
        )
    return texts


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return the bias of tokens. ``value``: token id (in JSON, its digits as text) -> number from -100 to 100."""
    if not isinstance(value, Mapping):
        raise UsageError(f"logit_bias is {value!r}", "give an object of token ids and numbers")
    pairs: dict[int, float] = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and _TOKEN_DIGITS.fullmatch(token)) and not _is_token(token):
            raise UsageError(f"logit_bias names token {token!r}", "give token ids")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise UsageError(f"logit_bias of token {token} is {bias!r}", "give a number from -100 to 100")
        pairs[int(token)] = float(bias)
    return tuple(sorted(pairs.items()))


def _structure(name: str, value: Any) -> Any:
    if name == "choice":
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise UsageError(f"choice is {value!r}", "give a list of texts")
        if not all(isinstance(text, str) and text for text in value):
            raise UsageError("choice holds an empty text", "give texts to choose from")
        return tuple(value)
    if value is None:
        return None
    if name == "json_schema":
        if value is not True and not isinstance(value, Mapping):
            raise UsageError(
                f"json_schema is {value!r}", "give an object, {} for any JSON value, or true for any JSON object"
            )
        return value
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} is {value!r}", "give a text")
    return value
