"""Open the export of a language model, without torch and transformers."""

from __future__ import annotations

from pathlib import Path

from deploykit.runtime.engines.causal_lm import OnnxCausalLm
from deploykit.tasks.text_generation.encode import ChatTokenizer
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator


def load_generator(directory: Path, task: TextGeneration, file: str, threads: int, **limits: int) -> LocalGenerator:
    """Open the decoder ``file`` of an export; ``limits`` are those of ``OnnxCausalLm``."""
    tokenizer = ChatTokenizer.load(directory, task.special_tokens, task.eos_token_ids)
    return LocalGenerator(task, tokenizer, OnnxCausalLm(directory / file, threads, context=task.max_length, **limits))
