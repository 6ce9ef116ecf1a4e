"""Open the export of a language model, without torch and transformers."""

from __future__ import annotations

from pathlib import Path

from deploykit.runtime.engines import load_language_model
from deploykit.tasks.text_generation.encode import ChatTokenizer
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator

DRAFT_FILE = "draft.safetensors"
"""Weights of the draft model in a packaged model."""


def load_generator(
    directory: Path, task: TextGeneration, engine: str, file: str, threads: int, *, draft: Path | None = None, **limits: int
) -> LocalGenerator:  # fmt: skip
    """Open the decoder ``file`` of an export with ``engine``; ``limits`` are those of ``CausalLm``. ``draft``: weights of
    its draft model; those in a packaged model are used without it."""
    tokenizer = ChatTokenizer.load(directory, task.special_tokens, task.eos_token_ids)
    if draft is None and (directory / DRAFT_FILE).exists():
        draft = directory / DRAFT_FILE
    if draft is None:
        model = load_language_model(engine, directory / file, threads, context=task.max_length, **limits)
        return LocalGenerator(task, tokenizer, model)
    from deploykit.runtime.engines.native.causal_lm import NativeCausalLm
    from deploykit.runtime.engines.native.causal_weights import CausalWeights

    small = CausalWeights(draft)
    model = NativeCausalLm(directory / file, threads, context=task.max_length, beside=small.token_bytes, **limits)
    guessing = NativeCausalLm(
        draft, threads, context=min(task.max_length, small.longest or task.max_length), beside=model.token_bytes,
        **{**limits, "max_rows": model.tokens_of_a_step},
    )  # fmt: skip
    return LocalGenerator(task, tokenizer, model, guessing)
