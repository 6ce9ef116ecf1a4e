"""Interfaces of an engine and of a decode model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from deploykit.runtime.search import Beam


Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


class Engine(Protocol):
    """A loaded graph, ready to run. Not thread-safe: one caller at a time.

    ``token_budget`` is the batch size, in tokens, at which the engine is fastest. ``computes_padding``: padding counts as tokens,
    and a text's result may depend, in the last bit, on its padded length.
    """

    token_budget: int
    computes_padding: bool

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        """Load ``graph``, to run on ``threads`` CPU threads or on GPU ``device``, whichever the engine uses.

        Raises EngineError naming the file if the engine cannot load it.
        """

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        """Run the graph. Returns its outputs, in the graph's order, as arrays that the caller owns."""

    def int8_kernels(self) -> int:
        """Return the number of INT8 matrix kernels compiled from the graph: the proof that quantization took effect."""


class BestTokens(Protocol):
    """Finds the most probable tokens. ``logits`` are float32 [rows, vocabulary]; no row depends on another."""

    def __call__(self, logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the ``k`` best tokens of each row: log-probabilities, descending, and ids, [rows, k] each.

        Of equal logits the lower id comes first.
        """

    def of(self, logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the log-probability of one token of each row: float32 [rows]."""

    def log_sums(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log(sum(exp(logits))) of each row, float32 [rows]: logits minus it are log-probabilities."""


@dataclass(frozen=True)
class DecodeLimits:
    """Upper limits of a decode model: number of rows, tokens of a source text, tokens of a translation."""

    rows: int
    source: int
    target: int


class DecodeModel(Protocol):
    """Encoder and decoder of a translation model, with the state of its rows.

    A row is a hypothesis with its position and its keys and values. The rows in use are always the first ones. Not
    thread-safe: one caller at a time.

    ``limits`` is None if any size is possible. ``pads``: encoding pads every text of a batch to the longest.
    ``rows_of_a_worker``: with at least twice as many rows, several models side by side are faster than this one.
    """

    rows: int
    pads: bool

    def __init__(self, folder: Path, files: Sequence[str], threads: int, device: int = 0) -> None:
        """Load encoder and decoder, the first two of ``files``, to run on ``threads`` CPU threads or on GPU ``device``.

        Raises EngineError naming the file if the engine cannot load it.
        """

    @property
    def limits(self) -> DecodeLimits | None: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def best(self) -> BestTokens: ...

    @property
    def rows_of_a_worker(self) -> int: ...

    def side_by_side(self, n: int) -> Sequence[DecodeModel]:
        """Return ``n`` models of the same graphs, each with its own rows and a share of the threads."""

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Any:
        """Encode texts, for ``admit``. The result is valid until the next call."""

    def reserve(self, rows: int, source: int) -> None:
        """Reserve memory for ``rows`` rows in all, with texts of up to ``source`` tokens. It is kept until no row is
        left.
        """

    def admit(self, cross: Any, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Append empty rows: for the i-th encoded text, of ``lengths[i]`` tokens, ``copies[i]`` rows that attend to
        it."""

    def choose(
        self, tokens: NDArray[np.int64], selection: TokenSelection
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Feed each row its next token, and apply ``select`` to the logits. Returns its result."""

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed each row its next token. Returns logits, float32 [rows, vocabulary].

        The array belongs to the model: the next step overwrites it. The caller may change it.
        """

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64], begin: int) -> None:
        """Copy the state of the rows ``sources`` to the rows ``targets`` of the same texts.

        Both share the first ``begin`` positions. No row is in both.
        """

    def remove(self, gone: NDArray[np.int64]) -> NDArray[np.int64]:
        """Remove the rows ``gone``; the last rows move into their places. Returns the former number of each row
        left."""

    def cache_bytes(self, rows: int, target: int, source: int) -> int:
        """Return the memory of the caches of ``rows`` rows with that many target and source tokens, in bytes.

        It does not count memory that the model takes in any case.
        """


@runtime_checkable
class MultiStepModel(Protocol):
    """A decode model that can take several steps by itself, as long as the rules stay the same."""

    def replace(self, rows: NDArray[np.int64], cross: Sequence[Any], lengths: Sequence[int]) -> None:
        """Reuse ``rows``, whose texts are done, for new encoded texts of ``lengths`` tokens."""

    def run_greedily(self, texts: SearchState, selection: TokenSelection, most: int) -> int:
        """Append tokens to all rows until one row ends, in at most ``most`` steps. Returns the number of steps."""

    def hold_beam(self, beam: Beam) -> HeldBeam | None:
        """Take over ``beam`` for ``run_beams``; None if it is too wide."""

    def run_beams(
        self, texts: SearchState, selection: TokenSelection, rows: NDArray[np.int64], beams: Sequence[Any], most: int
    ) -> int:
        """Run beam search until one of the ``beams`` (``HeldBeam``) is done, in at most ``most`` steps.

        ``rows``, [sentences, beams], are the hypotheses of each sentence, best first; they are updated. Returns the
        number of steps.
        """


class HeldBeam(Protocol):
    """A beam that a decode model has taken over."""

    @property
    def done(self) -> bool:
        """Whether its search is over."""

    def give_back(self) -> Beam: ...


Floats = NDArray[np.float32]


Ints = NDArray[np.int64]


@dataclass
class TokenSelection:
    """Rules for selecting tokens from the logits of a step. The ``best`` tokens of each row are returned, best first.

    - ``forced`` int32 [rows]: a token that must come, with probability 1; -1 for none.
    - ``forbidden`` int32, ``begin`` int32 [rows + 1]: forbidden tokens of all rows, ascending within a row; those of a
      row
      are ``forbidden[begin[row] : begin[row + 1]]``.
    - ``scored`` bool [rows]: compute log-probabilities; where False, only the best token is needed.
    - ``before`` bool [rows]: log-probabilities are those before any token was forbidden.
    - ``penalties``: (row, tokens, penalty) triples; the penalty divides positive scores and multiplies negative ones.
    - ``of_probabilities`` bool [rows]: penalties apply to log-probabilities; where False, to logits.
    - ``changed`` grows when arrays are replaced.
    """

    best: int
    forced: NDArray[np.int32]
    forbidden: NDArray[np.int32]
    begin: NDArray[np.int32]
    scored: NDArray[np.bool_]
    before: NDArray[np.bool_]
    of_probabilities: NDArray[np.bool_]
    penalties: list[tuple[int, Ints, float]] = field(default_factory=list)
    changed: int = 0

    def of_rows(self, rows: Sequence[int]) -> TokenSelection:
        """Return the selection of some ``rows``, which are ascending."""
        parts = [self.forbidden[self.begin[row] : self.begin[row + 1]] for row in rows]
        begin = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(part) for part in parts], out=begin[1:])
        number = {row: i for i, row in enumerate(rows)}
        penalties = [(number[row], tokens, penalty) for row, tokens, penalty in self.penalties if row in number]
        return TokenSelection(
            self.best, self.forced[rows], np.concatenate(parts), begin, self.scored[rows], self.before[rows],
            self.of_probabilities[rows], penalties,
        )  # fmt: skip


@dataclass
class SearchState:
    """State of a search, by row.

    - ``tokens`` int64 [rows, longest], of which the first ``lengths`` are valid; ``limits`` are their maximum numbers.
    - ``sums`` float32 [rows]: sums of log-probabilities.
    - ``ends`` bool [vocabulary]: tokens that end a text.
    """

    tokens: Ints
    lengths: Ints
    limits: Ints
    sums: Floats
    ends: NDArray[np.bool_]
