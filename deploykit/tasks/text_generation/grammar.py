"""Constrain answers to a JSON Schema, a regular expression, one of several texts, or a Lark grammar.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.errors import MissingDependencyError, UsageError
from deploykit.runtime.engines.native.sampling import native_mask
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.closed_schema import close_objects

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED = 32
"""Most grammars that are kept compiled."""
_MOST_CHARS = 100_000
"""Largest grammar: it is compiled in about half a second."""
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Without a limit a model may write white space up to ``max_new_tokens``."""


class Grammars:
    """Compile the constraints of requests, for one tokenizer.

    ``vocabulary``: width of the model's logits, which may exceed the number of the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        self._source = tokenizer
        self._vocabulary = vocabulary
        self._eos_token_ids = list(eos_token_ids)
        self._compiled: dict[tuple[str, str], LLMatcher] = {}

    def constraint(self, sampling: Sampling) -> Constraint | None:
        """Return a constraint for one answer; None where ``sampling`` has none.

        Raises MissingDependencyError without llguidance. Raises UsageError, naming the parameter and llguidance's
        reason, for one that is malformed, not supported, or that no text fits.
        """
        name = sampling.structure
        if name is None:
            return None
        value = getattr(sampling, name)
        try:
            key = name, json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{name} is not JSON: {error}", "give an object of JSON") from error
        if len(key[1]) > _MOST_CHARS:
            raise UsageError(
                f"{name} cannot be used: it has {len(key[1]):,} characters as JSON, the maximum is {_MOST_CHARS:,}",
                f"give a smaller {name}",
            )
        if key not in self._compiled:
            if len(self._compiled) >= _CACHED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = self._compile(name, value)
        return Constraint(self._compiled[key].deep_copy(), name)

    def _compile(self, name: str, value: Any) -> LLMatcher:
        tokenizer = self._tokenizer
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(tokenizer, _GRAMMARS[name](value), log_level=0)
        except ValueError as error:  # nested too deeply, or not a Unicode text
            reason = str(error)
        else:
            if matcher.is_error():
                reason = _reason(matcher)
            elif Constraint(matcher.deep_copy(), name).can_begin():
                return matcher
            else:
                reason = "no text of the model's tokens fits it"
        raise UsageError(f"{name} cannot be used: {reason}", f"change {name}")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "structured output needs llguidance, which is not installed", "pip install 'deploykit[serve]'"
            ) from error
        width = max(self._vocabulary, self._source.get_vocab_size())
        try:
            return LLTokenizer(self._source.to_str(), n_vocab=width, eos_token=self._eos_token_ids)
        except ValueError as error:
            raise UsageError(
                f"structured output does not support the model's tokenizer: {error}",
                "use a model with a byte-level or byte-fallback tokenizer",
            ) from error


class Constraint:
    """The constraint of one answer, with its state."""

    def __init__(self, matcher: LLMatcher, name: str) -> None:
        self._matcher = matcher
        self._name = name

    def copy(self) -> Constraint:
        """Return the same ways for another answer with the same text so far."""
        return Constraint(self._matcher.deep_copy(), self._name)

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing can follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def can_begin(self) -> bool:
        """Return whether any text matches, including the empty text."""
        allowed = any(self._matcher.compute_bitmask())
        return allowed and not self._matcher.is_error()

    def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of float32 [vocabulary] with -inf at the tokens that are not allowed next.

        Raises UsageError if the constraint is too complex to follow.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._error()
        return masked(logits, packed)

    def advance(self, token_id: int) -> None:
        """Update the rule with the chosen token. Raises UsageError where the constraint is too complex to follow, or does not
        allow the token."""
        if not self._matcher.consume_token(token_id):
            raise self._error()

    def _error(self) -> UsageError:
        return UsageError(f"{self._name} cannot be followed: {_reason(self._matcher)}", f"make {self._name} simpler")


def masked(logits: NDArray[np.float32], allowed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a copy of logits with -inf where the token's bit in ``allowed``, the lowest of a byte first, is 0 or there is none."""
    fast = native_mask()
    if fast is not None:
        return fast(logits, allowed)
    bits = np.unpackbits(allowed, bitorder="little", count=len(logits)).view(np.bool_)
    return np.where(bits, logits, np.float32(-np.inf))


def _reason(matcher: LLMatcher) -> str:
    """Return llguidance's message, without the dump of its state."""
    return str(matcher.get_error()).partition("\n<state>")[0].strip()


def _json_grammar(schema: Mapping[str, Any] | bool) -> str:
    from llguidance import LLMatcher

    text = json.dumps({"type": "object"} if schema is True else close_objects(json.loads(json.dumps(schema))))
    return str(LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITE_SPACE}))


def _regex_grammar(regex: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(regex))


def _choice_grammar(texts: Sequence[str]) -> str:
    from llguidance import LLMatcher

    quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    # Lark's strings are those of JSON, but for this control character.
    return str(LLMatcher.grammar_from_lark("start: " + quoted.replace("\x7f", "\\u007f")))


def _lark_grammar(grammar: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(grammar))


_GRAMMARS: Mapping[str, Callable[[Any], str]] = {
    "json_schema": _json_grammar,
    "regex": _regex_grammar,
    "choice": _choice_grammar,
    "grammar": _lark_grammar,
}
