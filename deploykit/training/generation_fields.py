"""Find the fields of a Hugging Face generation config that deploykit's decoding does not support."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from transformers import GenerationConfig

from deploykit.errors import ArtifactError

# Fields that change how ``generate`` computes or what else it returns, not the tokens of the best answer.
_CHANGE_NO_TOKEN = frozenset((
    "use_mtp", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "remove_invalid_values",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size", "_from_model_config",
    "transformers_version",
))  # fmt: skip
_SAMPLING = frozenset((
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"
))  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, 0, False, [], {})
_NEUTRAL_AT_ONE = ("num_beams", "num_beam_groups", "guidance_scale", "encoder_repetition_penalty")


def refuse_unknown(config: Any, name: str, decoded_by: Set[str]) -> None:
    """Raise ArtifactError, which calls the checkpoint ``name``, naming every field of ``config`` that would change the
    tokens, other than sampling and ``decoded_by``."""
    passed_over = decoded_by | _CHANGE_NO_TOKEN | _SAMPLING
    known = {field: getattr(config, field, None) for field in GenerationConfig().to_dict() if field not in passed_over}
    if refused := [
        field for field, value in known.items() if value not in (*_NEUTRAL, *((1,) if field in _NEUTRAL_AT_ONE else ()))
    ]:
        raise ArtifactError(
            f"{name}: its generation config sets {', '.join(refused)}, which deploykit's decoding does not support",
            "remove it from generation_config.json, and measure the checkpoint without it",
        )
