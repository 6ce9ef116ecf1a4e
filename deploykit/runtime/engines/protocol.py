"""Define what an engine and a decode model must offer."""

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
    """A graph loaded and ready to run. Not thread-safe: one caller at a time.

    ``token_budget`` is the rows x padded length of one run that it does best with.
    """

    token_budget: int

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        """Load ``graph``, for so many CPU threads or for the GPU of that number, whichever the engine runs on.

        Raises EngineError naming the file if the engine refuses it.
        """

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        """The graph's outputs, in its order, as arrays of the caller's own."""

    def int8_kernels(self) -> int:
        """How many INT8 matrix kernels the engine compiled from the graph: the proof that
        quantization took effect."""


class BestTokens(Protocol):
    """The most probable tokens. ``logits`` are float32 [rows, vocabulary]; no row depends on another."""

    def __call__(self, logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probabilities, descending, and ids of the ``k`` best tokens of each row: [rows, k] each.

        Of equals the lower id comes first.
        """

    def of(self, logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probability of one token of each row: float32 [rows]."""

    def log_sums(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [rows]: subtracted from a row it leaves log-probabilities."""


@dataclass(frozen=True)
class DecodeLimits:
    """The most that a decode model takes: rows, tokens of a source text, tokens of a translation."""

    rows: int
    source: int
    target: int


class DecodeModel(Protocol):
    """Encoder and decoder of a translation model, with rows: hypotheses, each at a position of its own, and its keys and
    values. The rows in use are the first ones. Not thread-safe: one caller at a time.

    ``rows_of_a_worker``: from twice as many rows on, models side by side beat this one alone. ``limits`` None: any size.
    ``pads``: texts encoded together take as long as if each were as long as the longest.
    """

    rows: int
    pads: bool

    def __init__(self, folder: Path, files: Sequence[str], threads: int, device: int = 0) -> None:
        """Load the encoder and the decoder, the first two of ``files``, for so many CPU threads or for the GPU of that
        number, whichever the engine runs on.

        Raises EngineError naming the file if the engine refuses it.
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
        """``n`` models of the same graphs, each with rows of its own and a share of the threads."""

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Any:
        """Texts, encoded for ``admit``; good until the next ones are."""

    def reserve(self, rows: int, source: int) -> None:
        """Make room for ``rows`` rows in all, with texts of up to ``source`` tokens. It is kept until no row is left."""

    def admit(self, cross: Any, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Append empty rows: for each encoded text, of so many tokens, so many that attend to it."""

    def choose(self, tokens: NDArray[np.int64], choice: Choice) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Feed each row its next token; returns what ``select`` does of the logits."""

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed each row its next token; returns logits, float32 [rows, vocabulary].

        The array is the model's own: the next step overwrites it, and the caller may change it.
        """

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64], begin: int) -> None:
        """Make each of the rows ``targets`` continue what the one of ``sources``, of the same text, holds.

        They share the first ``begin`` positions; none of ``targets`` is in ``sources``.
        """

    def remove(self, gone: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drop rows; the last ones move into their places. Returns, for each row left, its number before."""

    def cache_bytes(self, rows: int, target: int, source: int) -> int:
        """Memory that the caches of ``rows`` rows with that many target and source tokens take, beyond what the model
        takes in any case."""


@runtime_checkable
class TakesSteps(Protocol):
    """A decode model that goes on with a search by itself, for as long as the rules say the same."""

    def replace(self, rows: NDArray[np.int64], cross: Sequence[Any], lengths: Sequence[int]) -> None:
        """Give ``rows``, whose texts are over, others: encoded texts of so many tokens."""

    def run_greedily(self, texts: Texts, choice: Choice, most: int) -> int:
        """Append a token to each row, again and again: until one of them ends, but ``most`` times at most.

        Returns how many times.
        """

    def hold_beam(self, beam: Beam) -> HeldBeam | None:
        """``beam``, for ``run_beams``; None if it is too wide."""

    def run_beams(self, texts: Texts, choice: Choice, rows: NDArray[np.int64], beams: Sequence[Any], most: int) -> int:
        """Go on with beam search until that of one of the ``beams`` (``HeldBeam``) is over, but ``most`` steps at most.

        Returns how many.

        ``rows``: [sentences, beams], the hypotheses of each sentence, best first; it is changed.
        """


class HeldBeam(Protocol):
    """A beam in the hands of a decode model."""

    @property
    def done(self) -> bool:
        """Whether its search is over."""

    def give_back(self) -> Beam: ...


Floats = NDArray[np.float32]


Ints = NDArray[np.int64]


@dataclass
class Choice:
    """Of each row the ``best`` tokens, best first, and their log-probabilities.

    ``forced`` int32 [rows]: a token that must come, with probability 1; -1 where none must. ``forbidden`` int32: tokens that
    must not, ascending, row by row; those of a row are ``begin[row]`` to ``begin[row + 1]`` (int32 [rows + 1]).
    ``scored`` bool [rows]: where it is False the best token is wanted alone. ``before`` bool [rows]: probabilities are from
    before any token was forbidden. ``penalties``: rows, tokens and what divides (or multiplies) their scores, of
    log-probabilities where ``of_probabilities`` [rows] and of logits elsewhere. ``changed`` grows when arrays are replaced.
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


@dataclass
class Texts:
    """What a search goes on with: by row int64 ``tokens`` [rows, longest], of which ``lengths`` count, the ``limits`` of
    those, and float32 ``sums`` of log-probabilities; and which tokens end a text, bool [vocabulary]."""

    tokens: Ints
    lengths: Ints
    limits: Ints
    sums: Floats
    ends: NDArray[np.bool_]
