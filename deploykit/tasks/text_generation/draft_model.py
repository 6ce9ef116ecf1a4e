"""Check that one language model can guess tokens for another."""

from __future__ import annotations

from pathlib import Path

from deploykit.artifacts import load_manifest
from deploykit.errors import UsageError
from deploykit.runtime.find_graphs import find_graphs
from deploykit.tasks.text_generation.encode import ChatTokenizer
from deploykit.tasks.text_generation.facts import TextGeneration

_ENGINE = "native"
"""The engine that takes guesses, and runs drafts."""


def draft_weights(directory: Path, engine: str, draft: Path) -> tuple[Path, str]:
    """Return the file with the weights of the export ``draft``, to guess tokens of the export in ``directory``, which ``engine``
    runs; and the digest of ``draft``.

    Raises UsageError, naming the first difference, if their tokens differ, or the engine does not support guesses.
    """
    manifest = load_manifest(draft, "export")
    target, small = load_manifest(directory, verify=False).task, manifest.task
    for path, facts in ((directory, target), (draft, small)):
        if not isinstance(facts, TextGeneration):
            raise UsageError(f"a draft model is for language models, and {path} is none", "leave --draft-model out")
    assert isinstance(target, TextGeneration)
    assert isinstance(small, TextGeneration)
    if engine != _ENGINE:
        raise UsageError(
            f"a draft model is for the engine {_ENGINE}, and {directory} would run on {engine}",
            f"export it with --int8 or --int4 on a CPU that {_ENGINE} runs on, or leave --draft-model out",
        )
    difference = _difference(directory, target, draft, small)
    if difference:
        raise UsageError(
            f"{draft} cannot guess for {directory}: {difference}",
            "give the export of a smaller model with the same tokenizer, such as a student: finetune --teacher",
        )
    graphs = find_graphs(draft, manifest, engine=_ENGINE, precision="auto", to_run=False)
    return draft / graphs.files[0], manifest.digest


def _difference(directory: Path, target: TextGeneration, draft: Path, small: TextGeneration) -> str:
    """Return the first difference between the tokens of two models; empty if there is none."""
    if target.vocabulary != small.vocabulary:
        return f"it has {small.vocabulary:,} tokens, not {target.vocabulary:,}"
    if set(target.eos_token_ids) != set(small.eos_token_ids):
        return f"its answers end with {_listed(small.eos_token_ids)}, not {_listed(target.eos_token_ids)}"
    ours, theirs = (
        ChatTokenizer.load(path, task.special_tokens, task.eos_token_ids).tokenizer.get_vocab(with_added_tokens=True)
        for path, task in ((directory, target), (draft, small))
    )
    for text, token in sorted(ours.items(), key=lambda item: int(item[1])):
        if theirs.get(text) != token:
            return f"token {token} is {text!r}, and there {text!r} is {theirs.get(text, 'no token')}"
    return ""


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(ids)))
