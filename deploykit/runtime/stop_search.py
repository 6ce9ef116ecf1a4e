"""Search a stream of text for stop strings, without returning a part of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopSearch:
    """Cut a text that comes in pieces at the earliest position where any stop string begins.

    The cut does not depend on how the text is split: a stop string that is complete ends the text only when no other
    one that began before it can still be completed. A character costs the same whatever the number of stop strings
    and the length of the text.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._automaton = _automaton(tuple(stop))
        self._state = 0
        self._held = ""
        self._cut: int | None = None
        """Position in ``_held`` at which the earliest complete stop string begins."""

    def add(self, text: str, *, may_stop: bool = True) -> str:
        """Return the text that can no longer contain the start of a stop string. A stop string that is completed in ``text``
        is ignored unless ``may_stop``."""
        if not self._automaton.stops or self.stopped:
            return "" if self.stopped else text
        position = len(self._held)
        self._held += text
        for character in text:
            position += 1
            self._state = self._automaton.step(self._state, character)
            found = self._automaton.longest[self._state]
            if found and may_stop:
                begin = position - found
                self._cut = begin if self._cut is None else min(self._cut, begin)
            if self._cut is not None and position - self._automaton.depth[self._state] >= self._cut:
                return self._stop()
        certain = position - self._automaton.depth[self._state]
        given, self._held = self._held[:certain], self._held[certain:]
        if self._cut is not None:
            self._cut -= certain
        return given

    def finish(self) -> str:
        """Return the rest of the text, up to a stop string that is complete."""
        if self._cut is not None:
            return self._stop()
        given, self._held = self._held, ""
        return given

    def _stop(self) -> str:
        self.stopped = True
        given, self._held, self._cut = self._held[: self._cut], "", None
        return given


class _Automaton:
    """Aho and Corasick's automaton: a state is the longest end of the text that begins a stop string.

    ``depth``: its length. ``longest``: length of the longest stop string that ends here, or 0.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.depth, self.longest = [0], [0]
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        for stop in stops:
            state = 0
            for character in stop:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._fail.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.longest.append(0)
                state = self._next[state][character]
            self.longest[state] = len(stop)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self.longest[state] = self.longest[state] or self.longest[self._fail[state]]
            for character, after in self._next[state].items():
                self._fail[after] = self.step(self._fail[state], character)
                queue.append(after)

    def step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)
