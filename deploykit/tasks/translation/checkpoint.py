"""Read a translation checkpoint's configuration, and run the checkpoint in PyTorch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.decoding import Seconds, Sentence, longest_first
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.generation import Generation
from deploykit.runtime.search import Finished
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.generation_config import generation_config, read_generation
from deploykit.tasks.translation.plain_text import read_as_text, token_ids
from deploykit.tasks.translation.predictor import Translator
from deploykit.tasks.translation.source_prefix import NLLB_CODE, prefixed, source_prefix
from deploykit.tasks.translation.translated import Translated
from deploykit.text import normalize
from deploykit.training.checkpoint import check_vocabulary, load_model, load_tokenizer, quiet
from deploykit.training.padding import padded

_LANGUAGE_CODE = re.compile(rf"{NLLB_CODE.pattern}|[a-z]{{2}}_[A-Z]{{2}}|__[a-z]{{2,3}}__")
_T5_LENGTH = 512
_TOKENS_PER_BATCH = 4096
_LOGITS_PER_BATCH = 32_000_000


class TorchTranslator:
    """A checkpoint run by PyTorch: the reference for every export."""

    def __init__(self, model: Any, tokenizer: Any, task: Translation) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer
        self.seconds = Seconds()
        set_languages(tokenizer, task)
        read_as_text(tokenizer)

    @classmethod
    def load(cls, path: Path, *, source: str | None = None, target: str | None = None) -> TorchTranslator:
        """Load a checkpoint. One trained elsewhere may need ``source`` and ``target``."""
        quiet()
        tokenizer, model = load_tokenizer(str(path), fast=False), load_model(str(path), Translation.name)
        check_vocabulary(model, tokenizer, str(path), but=tokenizer.pad_token)  # see source_pad
        if (path / MANIFEST).exists():
            task = load_manifest(path, "checkpoint", verify=False).task
            assert isinstance(task, Translation), "load_model refuses others"
        else:
            task = translation_task(model.config, model.generation_config, tokenizer, str(path), source, target)
        return cls(model, tokenizer, task)

    @property
    def source_pad(self) -> int:
        """The id that pads sources: the padding id, or 0 if only a larger target vocabulary has that. Padding is
        masked."""
        pad = self.task.pad_token_id
        return pad if pad < self.model.get_encoder().get_input_embeddings().num_embeddings else 0

    def encode(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Return source token ids as in training and serving, truncated to ``task.max_source_length`` if ``cut``."""
        prefix = source_prefix(self.task, self.model.config)
        codes = self.task.languages if self.task.family == "marian" else ()
        texts = [prefixed(normalize(text), prefix, codes) for text in texts]
        return token_ids(self.tokenizer, texts, most=self.task.max_source_length if cut else None)

    def encode_targets(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Return target token ids as the decoder should generate them: without the start token, with the end token."""
        most = self.task.max_target_length - 1 if cut else None  # max_target_length counts the start token
        return token_ids(self.tokenizer, [normalize(text) for text in texts], side="text_target", most=most)

    def decode(self, target_ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in target_ids]

    def generate_ids(
        self, token_ids: Sequence[Sequence[int]], generation: Generation, *, noise: tuple[float, int] | None = None
    ) -> list[list[int]]:
        """Generate target ids with Hugging Face's ``generate``: without start token and padding, with the end token if
        any.

        ``noise`` is (largest random change of a logit, seed).
        """
        if noise is not None:
            return self._generate(token_ids, generation_config(self.task, generation), [_Noise(*noise)])
        return self._generate(token_ids, generation_config(self.task, generation))

    def generate_by_own(self, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Generate as ``generate_ids`` with the checkpoint's own generation config, but without sampling, into the
        task's language, and within the model's positions."""
        own, most = copy.deepcopy(self.model.generation_config), self.task.max_target_length
        own.do_sample, own.forced_bos_token_id = False, self.task.generation.forced_bos_token_id
        if own.max_new_tokens is not None:
            own.max_new_tokens = min(own.max_new_tokens, most - 1)
        else:
            own.max_length = min(own.max_length or most, most)
        return self._generate(token_ids, own)

    def _generate(
        self, token_ids: Sequence[Sequence[int]], config: Any, processors: Sequence[LogitsProcessor] = ()
    ) -> list[list[int]]:
        targets: list[list[int]] = [[] for _ in token_ids]
        with torch.inference_mode(), self._generating(config):
            for rows in _batches([len(ids) * (config.num_beams or 1) for ids in token_ids], _TOKENS_PER_BATCH):
                input_ids, mask = padded([token_ids[row] for row in rows], self.source_pad)
                device = self.model.device
                generated = self.model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=mask.to(device),
                    logits_processor=LogitsProcessorList([_Finite(), *processors]),
                )
                for row, ids in zip(rows, generated[:, 1:].tolist()):
                    targets[row] = self._until_end(ids)
        return targets

    def scores(
        self, token_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]], generation: Generation
    ) -> list[float]:
        """Compute the ``Translated.score`` of target ids (as ``generate_ids`` returns them) in one forward pass.

        A repetition penalty is ignored.
        """
        scores = [0.0] * len(token_ids)
        with torch.inference_mode():
            for rows in _batches([len(ids) for ids in target_ids], _LOGITS_PER_BATCH // self.task.vocabulary):
                targets = [target_ids[row] for row in rows]
                started = [[self.task.decoder_start_token_id, *ids[:-1]] for ids in targets]
                input_ids, mask = padded([token_ids[row] for row in rows], self.source_pad)
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

    @property
    def translator(self) -> Translator[TorchTranslator]:
        """A translator whose decoder this is."""
        return Translator(self.task, _Tokenizer(self), self)

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[Translated]:
        """Translate as ``Translator.translate`` does, which splits and joins texts the same way for every model."""
        return self.translator.translate(texts, generation, long_input=long_input, split=split, scored=scored)

    def run(self, sentences: Iterable[Sentence], finish: Callable[[Sentence], None]) -> None:
        """Set the result of each sentence. All must share ``generation`` and ``scored``."""
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
        """Do nothing: the model is freed with the object."""

    @contextmanager
    def _generating(self, config: Any) -> Iterator[None]:
        """Replace the model's generation config meanwhile: ``generate`` takes fields that ``config`` leaves out from
        there."""
        own = self.model.generation_config
        self.model.generation_config = config
        try:
            yield
        finally:
            self.model.generation_config = own

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.task.eos_token_ids), len(ids))
        return ids[:end]


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Raises NoNumberError if the logits of a row are NaN, or the highest is infinite."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        highest = scores.amax(-1)
        if (highest.isnan() | (highest == torch.inf)).any():
            raise NoNumberError
        return scores


class _Noise(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, most: float, seed: int) -> None:
        self._most = most
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        moved = torch.rand(scores.shape, generator=self._random) * 2 - 1
        return scores + self._most * moved.to(scores.device)


class _Tokenizer:
    """The checkpoint's own tokenizer with the interface that ``Translator`` expects."""

    def __init__(self, translator: TorchTranslator) -> None:
        self._translator = translator

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._translator.encode(texts, cut=False)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._translator.decode(ids)


def languages(tokenizer: Any, family: str) -> dict[str, int | None]:
    """Return the language codes of a multilingual checkpoint with their token ids; empty for one language pair."""
    if family == "marian":
        return {code[2:-2]: None for code in tokenizer.supported_language_codes}
    if family in ("m2m_100", "mbart"):
        if hasattr(tokenizer, "lang_code_to_id"):
            return dict(tokenizer.lang_code_to_id)
        codes = [t for t in tokenizer.all_special_tokens if NLLB_CODE.fullmatch(t)]
        return {code: tokenizer.convert_tokens_to_ids(code) for code in codes}
    return {}


def set_languages(tokenizer: Any, task: Translation) -> None:
    """Make the tokenizer of a multilingual checkpoint add the language codes of ``task``."""
    if task.family in ("m2m_100", "mbart"):
        tokenizer.tgt_lang = task.target
        tokenizer.src_lang = task.source


def translation_task(
    config: Any, generation: Any, tokenizer: Any, name: str, source: str | None = None, target: str | None = None
) -> Translation:
    """Build the task of a checkpoint from its Hugging Face configurations; errors call it ``name``.

    Languages default to the tokenizer's own. Raises UsageError for a language that a multilingual checkpoint does not
    know, ArtifactError for an unsupported configuration.
    """
    family = config.model_type
    _check_tokenizer(tokenizer, family, name)
    # Marian and BART name these fields in one way, T5 in another.
    for side, fields in {
        "encoder": ("encoder_layers", "num_layers"),
        "decoder": ("decoder_layers", "num_decoder_layers"),
    }.items():
        if 0 in (getattr(config, field, None) for field in fields):
            raise ArtifactError(f"{name}: its {side} has no layers", "give a model with layers in encoder and decoder")
    source, target = _languages_of(tokenizer, name, source, target)
    known = languages(tokenizer, family)
    for option, code in (("--source-lang", source), ("--target-lang", target)):
        # Marian marks only the target language: sources have no codes.
        if known and code not in known and not (family == "marian" and option == "--source-lang"):
            raise UsageError(f"{option} {code}: {name} does not know this language", f"it knows {', '.join(known)}")
    if source == target:
        raise UsageError(f"--source-lang and --target-lang are both {source}", "translate into another language")
    limit = _positions(tokenizer, config)
    target_limit = min(getattr(config, "max_position_embeddings", None) or _T5_LENGTH, 1024)
    start, eos, pad = _start_end_padding(config, generation, tokenizer, name)
    task = Translation(
        source=source,
        target=target,
        family=family,
        vocabulary=getattr(config, "decoder_vocab_size", None) or config.vocab_size,
        max_source_length=limit,
        max_target_length=target_limit,
        pad_token_id=pad,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        decoder_start_token_id=start,
        generation=read_generation(generation, name, target_limit, known.get(target)),
        languages=tuple(known),
    )
    special = len(token_ids(tokenizer, [source_prefix(task, config)])[0])
    if limit <= special:
        raise ArtifactError(
            f"{name}: it reads {limit} tokens, and {special} of a text are special ones or its prefix: no text has room",
            "correct model_max_length in tokenizer_config.json",
        )
    return task


def _check_tokenizer(tokenizer: Any, family: str, name: str) -> None:
    """Raise ArtifactError for a tokenizer that cannot translate."""
    if type(tokenizer).__name__.startswith("MBartTokenizer"):
        raise ArtifactError(
            f"{name}: is an mBART of 25 languages, whose decoder starts with the target language",
            "give an mBART-50 checkpoint, or one of another type",
        )
    if (
        family in ("m2m_100", "mbart")
        and not hasattr(tokenizer, "lang_code_to_id")
        and not hasattr(tokenizer, "legacy_behaviour")  # NLLB's
        and any(_LANGUAGE_CODE.fullmatch(token) for token in tokenizer.get_vocab())
    ):
        raise ArtifactError(
            f"{name}: its tokenizer class, {type(tokenizer).__name__}, does not put the languages' codes into texts",
            "name the model's own class as tokenizer_class in tokenizer_config.json: MBart50Tokenizer, NllbTokenizer or "
            "M2M100Tokenizer",
        )
    if tokenizer.eos_token_id is None or tokenizer.unk_token_id is None:
        raise ArtifactError(
            f"{name}: its tokenizer names no end token (eos_token) or no token for unknown pieces (unk_token)",
            "name it in tokenizer_config.json, or copy the checkpoint again",
        )


def _start_end_padding(config: Any, generation: Any, tokenizer: Any, name: str) -> tuple[int, int | list[int], int]:
    """Return the ids of the token that starts translations, of those that end them, and of the padding token."""
    start = _first(generation.decoder_start_token_id, getattr(config, "decoder_start_token_id", None))
    eos = _first(generation.eos_token_id, config.eos_token_id)
    pad = _first(generation.pad_token_id, config.pad_token_id, tokenizer.pad_token_id)
    counts_from_padding = config.model_type == "m2m_100"  # the positions of its tokens
    if start is None or eos is None or pad is None or (counts_from_padding and config.pad_token_id is None):
        raise ArtifactError(f"{name}: its config names no start, end or padding token", "copy the checkpoint again")
    if counts_from_padding and start == config.pad_token_id:
        raise ArtifactError(
            f"{name}: its translations start with the padding token, which has no position in models of type {config.model_type}",
            "set decoder_start_token_id in generation_config.json to the token that the model was trained with (usually </s>)",
        )
    if isinstance(start, list):
        raise ArtifactError(
            f"{name}: its decoder_start_token_id is a list, {start}, and each translation starts with one token",
            "give one token in generation_config.json",
        )
    return start, eos, pad


def _languages_of(tokenizer: Any, name: str, source: str | None, target: str | None) -> tuple[str, str]:
    own = [getattr(tokenizer, field, None) for field in ("source_lang", "target_lang")]
    found = (source or own[0], target or own[1])
    if found[0] is None or found[1] is None:
        raise UsageError(f"{name}: does not say which languages it translates", "give --source-lang and --target-lang")
    return found[0], found[1]


def _positions(tokenizer: Any, config: Any) -> int:
    limits = [getattr(config, "max_position_embeddings", None) or _T5_LENGTH]
    if 0 < tokenizer.model_max_length < 1_000_000:  # "no limit" is written as a huge number
        limits.append(tokenizer.model_max_length)
    return int(min(limits))


def _forced(position: int, length: int, ids: Sequence[int], generation: Generation) -> bool:
    """Return whether the search forced a target token instead of choosing it."""
    if position == 0 and generation.forced_bos_token_id is not None:
        return True
    return (
        position == length - 1
        and length + 1 >= generation.max_length
        and ids[position] == generation.forced_eos_token_id
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield batches of row numbers, short rows first, of at most ``most`` padded tokens unless a single row has
    more."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
