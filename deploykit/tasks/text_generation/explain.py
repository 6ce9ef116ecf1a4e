"""Explain answers of a language model: find the words of the prompt that led to the answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.explain import ExplainedText, Measure, check_gradients
from deploykit.attribution.words import Span, Unit, split_units, weights_of_words, without
from deploykit.errors import DataError, UsageError
from deploykit.tasks.text_generation.generator import LocalGenerator, Prompt, TextGenerator, as_prompt
from deploykit.text import is_blank

_STEPS = 50
_AT_ONCE = 10


class AnsweredPrompt:
    """A prompt (the user's message, where the model has a chat template) and an answer, the model's likeliest or a given
    one."""

    measure: Measure = "log-probability"
    is_label = False

    def __init__(self, generator: TextGenerator, text: str, answer: str | None, unit: Unit) -> None:
        """Raise DataError if the prompt is refused, or the answer empty or too long, UsageError for an answer to give to a
        served model, whose tokenizer is not here."""
        self._generator, self.text = generator, text
        self.words: Sequence[Span] = split_units(text, unit)
        if answer is None:
            sampling = dataclasses.replace(generator.task.sampling, temperature=0.0, n=1, best_of=None, logprobs=0)
            (found,) = generator.reply([self._prompt(())], sampling)
            if isinstance(found, DataError):
                raise found
            self.answer, self._ids = found[0].text, list(found[0].ids)
        else:
            if not isinstance(generator, LocalGenerator):
                raise UsageError(
                    "a served model explains only its own answers", "leave out --answer, or give the export"
                )
            ids = generator.tokenizer.tokenizer.encode(answer, add_special_tokens=False).ids
            self.answer, self._ids = answer, list(ids)
            if len(generator.prompt_ids(self._prompt(()))) + len(ids) > generator.task.max_length:
                raise DataError(
                    f"prompt and answer do not fit {generator.task.max_length:,} tokens", "give shorter ones"
                )
        if not self._ids or is_blank(self.answer):
            raise DataError("the answer is empty, so there is nothing to explain", "give another prompt")

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        prompts = [self._prompt(words) for words in removed]
        return np.array(self._generator.answer_logprobs(prompts, self._ids), np.float64)

    def score(self, value: float) -> float:
        return math.exp(value / len(self._ids))

    def _prompt(self, removed: Collection[int]) -> Prompt:
        return as_prompt(
            self._generator, without(self.text, [self.words[i] for i in removed]) if removed else self.text
        )


class DifferentiablePrompt(AnsweredPrompt):
    """The same, of a checkpoint in PyTorch."""

    def gradients(self) -> list[float]:
        """Return each word's share of the answer's log-probability, against a prompt whose words are padding tokens.

        Raises UsageError if the chat template does not write the prompt as it is.
        """
        import torch
        from captum.attr import IntegratedGradients

        generator: Any = self._generator
        rendered, ids, places = generator.tokenizer.placed(self._prompt(()))
        begin = rendered.find(self.text)
        if begin < 0:
            raise UsageError("the chat template changes the prompt, so its tokens cannot be located", "take occlusion")
        tokens = [(a - begin, b - begin) for a, b in places]
        answer = torch.tensor(self._ids)
        embed = generator.torch_model.get_input_embeddings()
        given = torch.tensor([[*ids, *self._ids]])
        own = torch.tensor([[a < len(self.text) and b > max(a, 0) for a, b in tokens] + [False] * len(answer)])
        padding = torch.where(own, torch.full_like(given, generator.task.pad_token_id), given)

        def value(embeddings: Any) -> Any:
            logits = generator.torch_model(inputs_embeds=embeddings, logits_to_keep=len(answer) + 1).logits[:, :-1]
            chosen = answer.expand(len(embeddings), -1)[..., None]
            return logits.float().log_softmax(-1).gather(-1, chosen)[..., 0].sum(-1)

        with torch.no_grad():
            inputs, baselines = embed(given), embed(padding)
        weights = IntegratedGradients(value).attribute(inputs, baselines, n_steps=_STEPS, internal_batch_size=_AT_ONCE)
        return weights_of_words(self.words, tokens, weights.sum(dim=-1)[0].detach().tolist())


def explained_text(generator: TextGenerator, text: str, answer: str | None, method: str, unit: Unit) -> ExplainedText:
    """Return a prompt to be explained by ``method``; "auto" is occlusion, which works better for language models.

    Raises UsageError if ``method`` needs a checkpoint, MissingDependencyError if it needs captum.
    """
    if method != "gradients":
        return AnsweredPrompt(generator, text, answer, unit)
    check_gradients(is_checkpoint=hasattr(generator, "torch_model"))
    return DifferentiablePrompt(generator, text, answer, unit)
