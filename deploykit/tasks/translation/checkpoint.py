"""Translation checkpoints: what their configuration says, and PyTorch running them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.decoding import Seconds, Sentence, longest_first
from deploykit.runtime.generation import Generation
from deploykit.runtime.search import Finished
from deploykit.runtime.serving_settings import LongInput
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import Translator
from deploykit.tasks.translation.source_prefix import source_prefix
from deploykit.tasks.translation.translated import Translated
from deploykit.text import normalize
from deploykit.training.checkpoint import load_model, load_tokenizer, quiet
from deploykit.training.padding import padded

_NLLB_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_T5_LENGTH = 512
_TOKENS_PER_BATCH = 4096
_LOGITS_PER_BATCH = 32_000_000
# What Hugging Face decodes by and we do not; each is neutral when it is None, 0, 1, False or empty.
_NOT_DECODED_BY = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "begin_suppress_tokens", "sequence_bias",
                   "exponential_decay_length_penalty", "guidance_scale", "min_new_tokens")  # fmt: skip


class TorchTranslator:
    """A checkpoint run by PyTorch: the reference every export is compared with."""

    def __init__(self, model: Any, tokenizer: Any, task: Translation) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer
        self.seconds = Seconds()
        set_languages(tokenizer, task)

    @classmethod
    def load(cls, path: Path, *, source: str | None = None, target: str | None = None) -> TorchTranslator:
        """Load a checkpoint; one trained elsewhere may need its languages named."""
        quiet()
        tokenizer, model = load_tokenizer(str(path), fast=False), load_model(str(path), Translation.name)
        if (path / MANIFEST).exists():
            task = load_manifest(path, "checkpoint", verify=False).task
            assert isinstance(task, Translation), "load_model refuses others"
        else:
            task = translation_task(model.config, model.generation_config, tokenizer, str(path), source, target)
        return cls(model, tokenizer, task)

    def encode(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Source token ids as training and serving see them, cut to ``task.max_source_length``."""
        prefix, most = source_prefix(self.task), self.task.max_source_length
        return self._encode("text", [prefix + normalize(text) for text in texts], most if cut else None)

    def encode_targets(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Target token ids as the decoder should give them: no start token, the end token included."""
        most = self.task.max_target_length - 1  # which counts the start token
        return self._encode("text_target", [normalize(text) for text in texts], most if cut else None)

    def decode(self, target_ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in target_ids]

    def generate_ids(self, token_ids: Sequence[Sequence[int]], generation: Generation) -> list[list[int]]:
        """Target ids by Hugging Face's ``generate``: without start token and padding, the end token if there is one."""
        targets: list[list[int]] = [[] for _ in token_ids]
        with torch.inference_mode(), self._generating(generation):
            for rows in _batches([len(ids) * generation.beam_size for ids in token_ids], _TOKENS_PER_BATCH):
                input_ids, mask = padded([token_ids[row] for row in rows], self.task.pad_token_id)
                device = self.model.device
                generated = self.model.generate(input_ids=input_ids.to(device), attention_mask=mask.to(device))
                for row, ids in zip(rows, generated[:, 1:].tolist()):
                    targets[row] = self._until_end(ids)
        return targets

    def scores(
        self, token_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]], generation: Generation
    ) -> list[float]:
        """The ``Translated.score`` of given target ids (as ``generate_ids`` gives them), by one forward pass.

        A repetition penalty is left out of account.
        """
        scores = [0.0] * len(token_ids)
        with torch.inference_mode():
            for rows in _batches([len(ids) for ids in target_ids], _LOGITS_PER_BATCH // self.task.vocabulary):
                targets = [target_ids[row] for row in rows]
                started = [[self.task.decoder_start_token_id, *ids[:-1]] for ids in targets]
                input_ids, mask = padded([token_ids[row] for row in rows], self.task.pad_token_id)
                decoder_input_ids, _ = padded(started, self.task.pad_token_id)
                inputs = {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": decoder_input_ids}
                logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits.cpu()
                if generation.renormalize:
                    never = [*generation.suppressed, *(w[0] for w in generation.bad_words if len(w) == 1)]
                    logits[..., never] = -torch.inf
                chosen = logits.log_softmax(-1).gather(-1, padded(targets, 0)[0][..., None])[..., 0]
                for row, ids, values in zip(rows, targets, chosen.tolist()):
                    counted = [v for i, v in enumerate(values[: len(ids)]) if not _forced(i, len(ids), ids, generation)]
                    scores[row] = sum(counted) / max(1, len(ids)) ** generation.length_penalty
        return scores

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        scored: bool = True,
    ) -> list[Translated]:
        """As ``Translator.translate``: texts are split and put together alike, whatever generates."""
        translator = Translator(self.task, _Tokenizer(self), self)
        return translator.translate(texts, generation, long_input=long_input, scored=scored)

    def run(self, sentences: Iterable[Sentence], finish: Callable[[Sentence], None]) -> None:
        """Give each of ``sentences``, which share a generation and whether they are scored, its result."""
        with self.seconds.counting("tokenizing"):
            sentences = longest_first(sentences)
        generation = sentences[0].generation if sentences else self.task.generation
        token_ids = [sentence.token_ids for sentence in sentences]
        target_ids = self.generate_ids(token_ids, generation)
        scored = bool(sentences) and sentences[0].scored
        scores = self.scores(token_ids, target_ids, generation) if scored else [0.0] * len(sentences)
        for sentence, ids, score in zip(sentences, target_ids, scores):
            sentence.result = Finished(np.array(ids, np.int64), score)
        with self.seconds.counting("detokenizing"):
            for sentence in sentences:
                finish(sentence)

    def close(self) -> None:
        """Nothing to release: the model goes with the object."""

    @contextmanager
    def _generating(self, generation: Generation) -> Iterator[None]:
        """Let the model generate by ``generation`` alone: what it leaves out, ``generate`` takes from the model."""
        own = self.model.generation_config
        self.model.generation_config = generation_config(self.task, generation)
        try:
            yield
        finally:
            self.model.generation_config = own

    def _encode(self, side: str, texts: list[str], most: int | None) -> list[list[int]]:
        if not texts:
            return []  # which the tokenizer does not take
        encoded = self.tokenizer(**{side: texts}, truncation=most is not None, max_length=most)
        return [list(ids) for ids in encoded["input_ids"]]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.task.eos_token_ids), len(ids))
        return ids[:end]


class _Tokenizer:
    """The checkpoint's own tokenizer, as ``Translator`` wants one."""

    def __init__(self, translator: TorchTranslator) -> None:
        self._translator = translator

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._translator.encode(texts, cut=False)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._translator.decode(ids)


def languages(tokenizer: Any, family: str) -> dict[str, int | None]:
    """The codes that a many-language checkpoint can be asked for, each with its token; empty for one of one pair."""
    if family == "marian":
        return {code[2:-2]: None for code in tokenizer.supported_language_codes}
    if family == "m2m_100":
        if hasattr(tokenizer, "lang_code_to_id"):
            return dict(tokenizer.lang_code_to_id)
        codes = [t for t in tokenizer.all_special_tokens if _NLLB_CODE.fullmatch(t)]
        return {code: tokenizer.convert_tokens_to_ids(code) for code in codes}
    return {}


def set_languages(tokenizer: Any, task: Translation) -> None:
    """Make the tokenizer of a many-language checkpoint add the codes of ``task``."""
    if task.family == "m2m_100":
        tokenizer.tgt_lang = task.target
        tokenizer.src_lang = task.source


def translation_task(
    config: Any, generation: Any, tokenizer: Any, name: str, source: str | None = None, target: str | None = None
) -> Translation:
    """What a checkpoint called ``name`` is, by its Hugging Face configurations.

    Languages not given are the tokenizer's own. Raises UsageError for a language that a many-language
    checkpoint does not know, ArtifactError for a configuration that we cannot follow.
    """
    family = config.model_type
    source, target = _languages_of(tokenizer, name, source, target)
    known = languages(tokenizer, family)
    for option, code in (("--source-lang", source), ("--target-lang", target)):
        # Marian's sources are not marked: only its targets have codes.
        if known and code not in known and not (family == "marian" and option == "--source-lang"):
            raise UsageError(f"{option} {code}: {name} does not know this language", f"it knows {', '.join(known)}")
    if source == target:
        raise UsageError(f"--source-lang and --target-lang are both {source}", "translate into another language")
    for field in _NOT_DECODED_BY:
        if getattr(generation, field, None) not in (None, 0, 1, False, [], {}):
            raise ArtifactError(
                f"{name}: its generation_config.json sets {field}, which deploykit does not decode by",
                "take it out, and measure what the checkpoint loses",
            )
    limit = _positions(tokenizer, config)
    target_limit = min(getattr(config, "max_position_embeddings", None) or _T5_LENGTH, 1024)
    start = _first(generation.decoder_start_token_id, getattr(config, "decoder_start_token_id", None))
    eos = _first(generation.eos_token_id, config.eos_token_id)
    pad = _first(generation.pad_token_id, config.pad_token_id, tokenizer.pad_token_id)
    if start is None or eos is None or pad is None:
        raise ArtifactError(f"{name}: its config names no start, end or padding token", "copy the checkpoint again")
    forced_bos = known.get(target)
    return Translation(
        source=source,
        target=target,
        family=family,
        vocabulary=getattr(config, "decoder_vocab_size", None) or config.vocab_size,
        max_source_length=limit,
        max_target_length=target_limit,
        pad_token_id=pad,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        decoder_start_token_id=start,
        generation=Generation(
            beam_size=generation.num_beams or 1,
            max_length=min(generation.max_length or target_limit, target_limit),
            min_length=generation.min_length or 0,
            length_penalty=1.0 if generation.length_penalty is None else float(generation.length_penalty),
            early_stopping=generation.early_stopping or False,
            no_repeat_ngram_size=generation.no_repeat_ngram_size or 0,
            repetition_penalty=generation.repetition_penalty or 1.0,
            bad_words=tuple(tuple(ids) for ids in generation.bad_words_ids or ()),
            suppressed=tuple(generation.suppress_tokens or ()),
            forced_bos_token_id=forced_bos if forced_bos is not None else generation.forced_bos_token_id,
            forced_eos_token_id=_single(generation.forced_eos_token_id),
            renormalize=bool(generation.renormalize_logits),
        ),
        languages=tuple(known),
    )


def generation_config(task: Translation, generation: Generation) -> Any:
    """``generation`` as Hugging Face's own class, complete."""
    return GenerationConfig(
        num_beams=generation.beam_size,
        max_length=generation.max_length,
        min_length=generation.min_length,
        length_penalty=generation.length_penalty,
        early_stopping=generation.early_stopping,
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
    )


def _languages_of(tokenizer: Any, name: str, source: str | None, target: str | None) -> tuple[str, str]:
    own = [getattr(tokenizer, field, None) for field in ("source_lang", "target_lang")]
    found = (source or own[0], target or own[1])
    if found[0] is None or found[1] is None:
        raise UsageError(f"{name}: does not say which languages it translates", "give --source-lang and --target-lang")
    return found[0], found[1]


def _positions(tokenizer: Any, config: Any) -> int:
    limits = [getattr(config, "max_position_embeddings", None) or _T5_LENGTH]
    if tokenizer.model_max_length < 1_000_000:  # "no limit" is written as a huge number
        limits.append(tokenizer.model_max_length)
    return int(min(limits))


def _forced(position: int, length: int, ids: Sequence[int], generation: Generation) -> bool:
    """Whether a target token was put there by the search and not chosen."""
    if position == 0 and generation.forced_bos_token_id is not None:
        return True
    return (
        position == length - 1
        and length + 1 >= generation.max_length
        and ids[position] == generation.forced_eos_token_id
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _single(value: Any) -> int | None:
    found: int | None = value[0] if isinstance(value, list) else value
    return found


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows by length, short ones first, no batch of more than ``most`` tokens when padded (but for a single row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
