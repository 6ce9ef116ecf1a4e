"""Check on real texts that the graphs and the decode loop compute the same as PyTorch and ``generate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deploykit.errors import ExportError
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.generation import Generation
from deploykit.tasks.translation.checkpoint import TorchTranslator

_BEAMS = 4
_STEPS = 24
_OWN_ROWS = 8
_TOLERANCE = 1e-3
_TIE = 1e-4
"""Score difference (log-probability per token) within which two translations are a tie for PyTorch."""
_LEAST_NOISE = 1e-6
_DRAWS = 16


@dataclass(frozen=True)
class GenerationParity:
    """Numbers of sentences with ``equal`` ids, and of ``ties``.

    In a tie PyTorch scores both translations within 1e-4 of each other, or itself generates ours when its logits change
    by no more than the graph's differ from them, and by at most 1e-4.
    """

    beams: int
    equal: int
    ties: int


@dataclass(frozen=True)
class Parity:
    """Largest differences over ``rows`` sentences: of the encoder's cross-attention keys and values, relative to the
    largest one, and of the decoder's log-probabilities over ``steps`` steps."""

    rows: int
    steps: int
    encoder_difference: float
    decoder_difference: float
    generations: tuple[GenerationParity, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_parity(
    reference: TorchTranslator, model: Seq2SeqModel, token_ids: Sequence[Sequence[int]], *, beams: bool = True
) -> Parity:
    """Compare both graphs, then whole generations: greedy, and with beams if ``beams``.

    Raises ExportError with the measured difference if they are not the same.
    """
    encoder = max(_encoder_difference(reference, model, ids) for ids in token_ids[:: max(1, len(token_ids) // 16)])
    decoder = max(_decoder_difference(reference, model, ids) for ids in token_ids[:: max(1, len(token_ids) // 16)])
    if not encoder <= _TOLERANCE or not decoder <= _TOLERANCE:  # "not <=" catches NaN too
        raise ExportError(
            f"the graphs differ from the PyTorch model: the encoder's keys and values by {encoder:.2g} of the largest, "
            f"the decoder's log-probabilities by {decoder:.2g}",
            "this checkpoint does not export faithfully; nothing was written",
        )
    _check_own_search(reference, token_ids[:: max(1, len(token_ids) // _OWN_ROWS)])
    own = reference.task.generation
    sizes = (1, max(_BEAMS, own.beam_size)) if beams else (1,)
    generations = [dataclasses.replace(own, beam_size=size) for size in sizes]
    noise = min(max(2 * decoder, _LEAST_NOISE), _TIE)
    compared = tuple(_compare_generations(reference, model, token_ids, generation, noise) for generation in generations)
    return Parity(len(token_ids), _STEPS, encoder, decoder, compared)


def _check_own_search(reference: TorchTranslator, token_ids: Sequence[Sequence[int]]) -> None:
    """Raise ExportError if the checkpoint's own generation config gives other tokens than the search parameters read
    from it."""
    theirs = reference.generate_by_own(token_ids)
    ours = reference.generate_ids(token_ids, reference.task.generation)
    for a, b in zip(theirs, ours):
        if a != b:
            raise ExportError(
                f"with its own generation config the checkpoint answers {reference.decode([a])[0]!r} ({len(a)} tokens), "
                f"with the fields that deploykit reads from it {reference.decode([b])[0]!r} ({len(b)} tokens)",
                "report this with the checkpoint's generation_config.json",
            )


def _encoder_difference(reference: TorchTranslator, model: Seq2SeqModel, ids: Sequence[int]) -> float:
    ours = model.encode([ids])[0].transpose(1, 2, 0, 3)  # PyTorch's layout: layers, heads, tokens, size
    start = torch.tensor([[reference.task.decoder_start_token_id]])
    with torch.inference_mode():
        output = reference.model(input_ids=torch.tensor([list(ids)]), decoder_input_ids=start, use_cache=True)
    layers = output.past_key_values.cross_attention_cache.layers
    theirs = np.stack([part[0].numpy() for layer in layers for part in (layer.keys, layer.values)])
    ours = ours[..., : theirs.shape[-1]]  # the rest is zero padding of a head
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


def _decoder_difference(reference: TorchTranslator, model: Seq2SeqModel, ids: Sequence[int]) -> float:
    """Return the largest difference over the steps of a greedy search without end token."""
    model.admit(model.encode([ids]), [len(ids)], [1])
    tokens = [reference.task.decoder_start_token_id]
    ours = []
    for _ in range(min(_STEPS, reference.task.max_target_length - 1)):
        logits = model.step(np.array(tokens[-1:]))[0]
        ours.append(logits.astype(np.float64))
        tokens.append(int(logits.argmax()))
    model.remove(np.array([0]))
    with torch.inference_mode():
        theirs = reference.model(
            input_ids=torch.tensor([list(ids)]), decoder_input_ids=torch.tensor([tokens[:-1]])
        ).logits
    expected = theirs[0].double().log_softmax(-1).numpy()
    actual = torch.from_numpy(np.stack(ours)).log_softmax(-1).numpy()
    return float(np.abs(expected - actual).max())


def _compare_generations(
    reference: TorchTranslator,
    model: Seq2SeqModel,
    token_ids: Sequence[Sequence[int]],
    generation: Generation,
    noise: float,
) -> GenerationParity:
    expected = reference.generate_ids(token_ids, generation)
    sentences = [Sentence(ids, generation, scored=False) for ids in token_ids]
    Decoder(model, reference.task).run(sentences)
    actual = [sentence.result.tokens.tolist() if sentence.result else [] for sentence in sentences]
    differing = [i for i, (a, b) in enumerate(zip(expected, actual)) if a != b]
    sources = [token_ids[i] for i in differing]
    theirs, ours = (reference.scores(sources, [ids[i] for i in differing], generation) for ids in (expected, actual))
    unlike = [(i, a, b) for i, a, b in zip(differing, theirs, ours) if not abs(a - b) <= _TIE]
    wanted = {i: actual[i] for i, _, _ in unlike}
    near = _near_ties(reference, token_ids, wanted, generation, noise) if wanted else set()
    for i, a, b in unlike:
        if i not in near:
            raise ExportError(
                f"with {generation.beam_size} beams, sentence {i} of {len(token_ids)} is translated differently: "
                f"{reference.decode([actual[i]])[0]!r} (score {b:.5f}) instead of {reference.decode([expected[i]])[0]!r} "
                f"({a:.5f})",
                "this checkpoint does not export faithfully; nothing was written",
            )
    return GenerationParity(generation.beam_size, len(token_ids) - len(differing), len(differing))


def _near_ties(
    reference: TorchTranslator,
    token_ids: Sequence[Sequence[int]],
    wanted: Mapping[int, Sequence[int]],
    generation: Generation,
    noise: float,
) -> set[int]:
    """Return the sentence numbers of the ``wanted`` translations that PyTorch generates too if its logits change
    randomly by up to ``noise``. There, two tokens or beams were so close at some step that rounding decides between
    them."""
    left = dict(wanted)
    for seed in range(_DRAWS):
        if not left:
            break
        rows = list(left)
        found = reference.generate_ids([token_ids[row] for row in rows], generation, noise=(noise, seed))
        left = {row: left[row] for row, ids in zip(rows, found) if ids != left[row]}
    return wanted.keys() - left.keys()
