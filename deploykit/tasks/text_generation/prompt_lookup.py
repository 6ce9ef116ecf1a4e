"""Guess an answer's next tokens from repetitions in prompt and answer.

The guess is the text that followed an earlier occurrence of the last tokens. Source: Saxena, "Prompt Lookup Decoding" (2023),
the idea behind ``prompt_lookup_num_tokens`` of Hugging Face's ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence

_GRAMS = (3, 2)
"""Numbers of last tokens that are looked up, in this order, until an earlier occurrence is found."""
_MOST = 8
"""Maximum tokens of a guess: more would often displace the guesses of other answers without success."""
_LEAST_SHARE = 0.1
"""Least share of right guesses; below it guessing pauses, because a step with guesses takes longer."""
_REST = 32
"""Number of tokens for which guessing pauses."""


class PromptLookup:
    """The guesses for one answer. ``share``: of guessed tokens that were right, lately."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        # The place after a gram's last occurrence. The end of the text is no occurrence: nothing follows it yet.
        self._after: dict[tuple[int, ...], int] = {}
        self.share, self._rests = 0.5, 0
        self.add(prompt)

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            for gram in _GRAMS:
                if len(self._tokens) >= gram:
                    self._after[tuple(self._tokens[-gram:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that may come next."""
        if self._rests:
            self._rests -= 1
            return []
        places = (self._after.get(tuple(self._tokens[-gram:])) for gram in _GRAMS)
        place = next((place for place in places if place is not None), None)
        return [] if place is None else self._tokens[place : place + min(most, _MOST)]

    def learn(self, guessed: int, right: int) -> None:
        """Record how many of the ``guessed`` tokens were ``right``."""
        if guessed:
            self.share += 0.25 * (right / guessed - self.share)
            if self.share < _LEAST_SHARE:
                self.share, self._rests = 0.5, _REST
