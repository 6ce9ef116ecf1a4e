"""Group the running sentences by search method, and keep the rules for their next tokens up to date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.decoding.rows import Rows
from deploykit.runtime.decoding.sentence import Sentence
from deploykit.runtime.engines.protocol import MultiStepModel, TokenSelection
from deploykit.runtime.search import Ints, Rules, candidates


@dataclass
class Plan:
    """The running sentences, grouped by search method. Valid until a sentence joins or leaves.

    - ``rules``: the rules in use, each with its rows.
    - ``varies``: some rules depend on the tokens generated, so they must be applied again at every step.
    - ``greedy``: rows of greedy search.
    - ``beams``: sentences of one beam size with their rows, [sentences, beams]; ``Sentence.rows`` are views of it.
    - ``held``: the model may take several steps by itself.
    """

    selection: TokenSelection
    rules: list[tuple[Rules, Ints]]
    greedy: Ints
    beams: list[tuple[list[Sentence], Ints]]
    varies: bool
    held: bool = False

    def update_selection(self, rows: Rows) -> int:
        """Update ``selection`` for this step. Returns the number of steps for which it stays valid."""
        selection, n = self.selection, len(rows.sentences)
        lengths, turns = rows.lengths[:n], rows.rules_change[:n]
        if selection.changed and not self.varies and (same_for := int((turns - lengths).min())) > 0:
            return same_for
        selection.penalties = []
        forbidden: list[list[int]] = [[]] * n
        for rules, theirs in self.rules:
            of_theirs = lengths[theirs]
            selection.forced[theirs] = rules.forced(of_theirs)
            turns[theirs] = rules.next_change(of_theirs)
            for row, length in zip(theirs.tolist(), of_theirs.tolist()):
                if not rules.vary:
                    forbidden[row] = rules.always(length)
                    continue
                tokens = rows.tokens[row, :length]
                forbidden[row] = rules.forbidden(tokens)
                if rules.penalty != 1.0:
                    selection.penalties.append((row, np.unique(tokens), rules.penalty))
        selection.forbidden, selection.begin = _concatenate(forbidden)
        selection.changed += 1
        return int((turns - lengths).min())


def make_plan(running: Sequence[Sentence], rows: Rows, runner: MultiStepModel | None) -> Plan:
    """Group the ``running`` sentences by rules and search method. ``runner`` is the model, if it can take several steps."""
    n = len(rows.sentences)
    by_rules: dict[Rules, list[int]] = {}
    for row, sentence in enumerate(rows.sentences):
        assert sentence.rules is not None
        by_rules.setdefault(sentence.rules, []).append(row)
    sizes: dict[int, list[Sentence]] = {}
    for sentence in running:
        if sentence.beam is not None:
            sizes.setdefault(sentence.generation.beam_size, []).append(sentence)
    nothing = np.empty(0, np.int32)  # the first step fills in the forbidden tokens
    plan = Plan(
        TokenSelection(1, rows.forced[:n], nothing, nothing, rows.scored[:n], rows.before[:n], rows.in_beam[:n]),
        [(rules, np.array(theirs)) for rules, theirs in by_rules.items()],
        np.flatnonzero(~rows.in_beam[:n]),
        [],
        varies=any(rules.vary for rules in by_rules),
    )
    for size, sentences in sizes.items():
        together = np.stack([sentence.rows for sentence in sentences])
        for sentence, beam_rows in zip(sentences, together):
            sentence.rows = beam_rows
        plan.beams.append((sentences, together))
        best = min(candidates(size, rows.eos_token_ids), len(rows.ends))
        plan.selection.best = max(plan.selection.best, best)
    if runner is not None:
        plan.held = _hand_over_beams(plan, runner)
    return plan


def _hand_over_beams(plan: Plan, runner: MultiStepModel) -> bool:
    """Return whether the model may take steps by itself.

    If so, hand the beams over to the model; otherwise take them back.
    """
    one_kind = len(plan.beams) + bool(len(plan.greedy)) == 1 and not plan.varies
    sentences = [sentence for group, _ in plan.beams for sentence in group]
    for sentence in sentences:
        assert sentence.beam is not None
        if one_kind and sentence.held is None:
            sentence.held = runner.hold_beam(sentence.beam)
        elif not one_kind and sentence.held is not None:
            sentence.beam, sentence.held = sentence.held.give_back(), None
    return one_kind and all(sentence.held is not None for sentence in sentences)


def _concatenate(tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Concatenate the rows' tokens. Returns them, and the index at which each row begins."""
    begin = np.zeros(len(tokens) + 1, np.int32)
    np.cumsum([len(row) for row in tokens], out=begin[1:])
    return np.array([token for row in tokens for token in row], np.int32), begin
