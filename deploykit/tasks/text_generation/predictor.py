"""Open the export of a language model, without torch and transformers."""

from __future__ import annotations

from pathlib import Path

from deploykit.runtime.engines import load_language_model
from deploykit.tasks.text_generation.encode import ChatTokenizer
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator


def load_generator(
    directory: Path, task: TextGeneration, engine: str, file: str, threads: int, **limits: int
) -> LocalGenerator:
    """Open the decoder ``file`` of an export with ``engine``; ``limits`` are those of ``CausalLm``."""
    tokenizer = ChatTokenizer.load(directory, task.special_tokens, task.eos_token_ids)
    model = load_language_model(engine, directory / file, threads, context=task.max_length, **limits)
    return LocalGenerator(task, tokenizer, model)
