"""Convert between Hugging Face generation configs and deploykit's search parameters."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

from deploykit.errors import ArtifactError
from deploykit.runtime.generation import Generation
from deploykit.tasks.translation.facts import Translation
from deploykit.training.generation_fields import refuse_unknown

_LOG = logging.getLogger(__name__)
_DECODED_BY = frozenset((
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "num_beams", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
))  # fmt: skip


def read_generation(config: Any, name: str, longest: int, forced_bos: int | None) -> Generation:
    """Return the search parameters of a checkpoint; errors call it ``name``.

    ``longest`` is the model's number of target positions, including the start token. ``forced_bos`` is the target
    language's token and replaces the config's own. Logs a warning if the config asks for sampling, which deploykit does
    not do. Raises ArtifactError naming every other unsupported field that would change the tokens.
    """
    refuse_unknown(config, name, _DECODED_BY)
    beams = config.num_beams or 1
    if config.do_sample:
        search = "greedy search" if beams == 1 else f"{beams} beams"
        _LOG.warning("%s: its generation config sets sampling (do_sample); deploykit uses %s", name, search)
    most, least = config.max_length, config.min_length
    if config.max_new_tokens is not None:  # takes precedence, and does not count the start token
        most = config.max_new_tokens + 1
    if config.min_new_tokens is not None:
        least = config.min_new_tokens + 1
    most = min(most or longest, longest)
    return Generation(
        beam_size=beams,
        max_length=most,
        min_length=min(least or 0, most),
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=config.early_stopping or False,
        no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
        repetition_penalty=config.repetition_penalty or 1.0,
        bad_words=tuple(tuple(ids) for ids in config.bad_words_ids or ()),
        suppressed=tuple(config.suppress_tokens or ()),
        forced_bos_token_id=forced_bos if forced_bos is not None else config.forced_bos_token_id,
        forced_eos_token_id=_forced_eos(config.forced_eos_token_id, name),
        renormalize=bool(config.renormalize_logits),
    )


def generation_config(task: Translation, generation: Generation) -> GenerationConfig:
    """Return ``generation`` as a complete Hugging Face config that can be saved.

    Greedy search leaves out the fields for beams: transformers refuses to save both together.
    """
    of_beams = {"length_penalty": generation.length_penalty, "early_stopping": generation.early_stopping}
    return GenerationConfig(
        num_beams=generation.beam_size,
        max_length=generation.max_length,
        min_length=generation.min_length,
        no_repeat_ngram_size=generation.no_repeat_ngram_size,
        repetition_penalty=generation.repetition_penalty,
        bad_words_ids=[list(ids) for ids in generation.bad_words] or None,
        suppress_tokens=list(generation.suppressed) or None,
        forced_bos_token_id=generation.forced_bos_token_id,
        forced_eos_token_id=generation.forced_eos_token_id,
        renormalize_logits=generation.renormalize,
        do_sample=False,
        pad_token_id=task.pad_token_id,
        eos_token_id=list(task.eos_token_ids),
        decoder_start_token_id=task.decoder_start_token_id,
        **(of_beams if generation.beam_size > 1 else {}),
    )


def _forced_eos(value: int | list[int] | None, name: str) -> int | None:
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise ArtifactError(
            f"{name}: its forced_eos_token_id is a list, {value}, and a translation that is cut ends with one token",
            "give one token in generation_config.json",
        )
    return value[0] if value else None
