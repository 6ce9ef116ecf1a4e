"""Continue the sentences with the tokens that a step has found, and return the finished ones with their results."""

from __future__ import annotations

import math

import numpy as np

from deploykit.runtime.decoding.plan import Plan
from deploykit.runtime.decoding.rows import Rows
from deploykit.runtime.decoding.sentence import Sentence
from deploykit.runtime.engines.protocol import DecodeModel
from deploykit.runtime.search import Continuations, Finished, Floats, Ints, candidates


def choose_greedily(plan: Plan, rows: Rows, chosen: Ints, gained: Floats) -> list[Sentence]:
    """Append the ``chosen`` token to each greedy row, and its log-probability to the score where one is requested."""
    greedy = plan.greedy
    lengths, gained = rows.lengths[greedy], gained[greedy]
    rows.sums[greedy] += np.where(plan.selection.scored[greedy] | np.isnan(gained), gained, np.float32(0))
    rows.tokens[greedy, lengths] = chosen[greedy]
    rows.lengths[greedy] = lengths + 1
    return finished_greedy(plan, rows)


def finished_greedy(plan: Plan, rows: Rows) -> list[Sentence]:
    """Return the finished greedy sentences, with their results. One whose score is NaN ends at once."""
    greedy = plan.greedy
    lengths = rows.lengths[greedy]
    done = []
    ends = rows.ends[rows.tokens[greedy, lengths - 1]] | (lengths >= rows.limits[greedy]) | np.isnan(rows.sums[greedy])
    for row in greedy[ends].tolist():
        sentence, length = rows.sentences[row], int(rows.lengths[row])
        score = float(rows.sums[row]) / (length - 1) ** sentence.generation.length_penalty
        sentence.result = Finished(rows.tokens[row, 1:length].copy(), score)
        done.append(sentence)
    return done


def finished_beams(plan: Plan) -> list[Sentence]:
    """Return the finished sentences among the beams that the model holds, with their results."""
    done = []
    for sentence in (sentence for group, _ in plan.beams for sentence in group):
        if sentence.held is not None and sentence.held.done:
            sentence.result = sentence.held.give_back().finished[0]
            done.append(sentence)
    return done


def advance_beams(plan: Plan, rows: Rows, model: DecodeModel, values: Floats, columns: Ints) -> list[Sentence]:
    """Advance every beam by one step. Returns the finished sentences. One with a score of NaN ends at once, with that score.

    ``values`` and ``columns`` are log-probabilities and ids of each row's best tokens, best first.
    """
    done = []
    for sentences, of_beams in plan.beams:
        n, size = of_beams.shape
        totals = (rows.sums[of_beams][:, :, None] + values[of_beams]).reshape(n, -1)
        count = candidates(size, rows.eos_token_ids)
        best = np.argsort(-totals, axis=1, kind="stable")[:, :count]
        each = np.arange(n)[:, None]
        parents, scores = best // values.shape[1], totals[each, best]
        tokens = columns[of_beams[each, parents], best % values.shape[1]]
        lengths = rows.lengths[of_beams[:, 0]]
        ending = rows.ends[tokens].any(axis=1) | (lengths + 1 >= rows.limits[of_beams[:, 0]])
        broken = np.isnan(totals).any(axis=1)
        going = np.ones(n, bool)
        for i, sentence in enumerate(sentences):
            beam = sentence.beam
            assert beam is not None
            if broken[i]:
                sentence.result = Finished(np.empty(0, np.int64), math.nan)
                done.append(sentence)
                going[i] = False
                continue
            if not ending[i] and not beam.finished:
                continue  # the best ones continue as they are
            length = int(lengths[i])
            hypotheses = rows.tokens[of_beams[i], :length]
            found = Continuations(parents[i].tolist(), tokens[i].tolist(), scores[i].tolist())
            following = beam.advance(found, length, hypotheses)
            if following is None:
                sentence.result = beam.finished[0]
                done.append(sentence)
                going[i] = False
            else:
                parents[i, :size], tokens[i, :size] = following.parents, following.tokens
                scores[i, :size] = following.scores
        if going.any():
            lengths = lengths[going]
            of_beams[going] = now = _rearrange(rows, model, of_beams[going], parents[going, :size], lengths)
            rows.tokens[now, lengths[:, None]] = tokens[going, :size]
            rows.lengths[now] = lengths[:, None] + 1
            rows.sums[now] = scores[going, :size]
    return done


def _rearrange(rows: Rows, model: DecodeModel, of_beams: Ints, parents: Ints, lengths: Ints) -> Ints:
    """Assign a row to each new hypothesis, [sentences, beams].

    A parent's first child keeps the parent's row; further children get the rows of dropped hypotheses. A dropped
    hypothesis shares its beginning with the new one, and so do their caches: only the positions after it are copied.
    """
    now: Ints = of_beams[np.arange(len(of_beams))[:, None], parents]
    forked = (np.sort(parents, axis=1) != np.arange(of_beams.shape[1])).any(axis=1)
    if not forked.any():
        return now
    sources, targets = [], []
    for i in np.flatnonzero(forked):
        each = parents[i].tolist()
        dropped = [j for j in range(len(each)) if j not in each]
        taken: set[int] = set()
        for j, parent in enumerate(each):
            if parent in taken:
                now[i, j] = of_beams[i, dropped.pop()]
                sources.append(of_beams[i, parent])
                targets.append(now[i, j])
            taken.add(parent)
    source, target, longest = np.array(sources), np.array(targets), int(lengths[forked].max())
    same = rows.tokens[source, :longest] == rows.tokens[target, :longest]
    begin = int(np.where(same.all(axis=1), longest, same.argmin(axis=1)).min())
    model.copy(source, target, begin)
    rows.tokens[target, begin:longest] = rows.tokens[source, begin:longest]
    return now
