"""Save a translation checkpoint's tokenizer for serving, read from the transformers object.

Ids, added tokens and language codes come from the object and not from the checkpoint's files, because transformers
interprets those files in ways of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import ArtifactError, ExportError
from deploykit.tasks.translation.plain_text import read_as_text, splits_special, token_ids
from deploykit.tasks.translation.source_prefix import NLLB_CODE, prefixed, task_prefixes
from deploykit.tasks.translation.tokenizer import (
    SOURCE_SPM,
    TARGET_SPM,
    TOKENIZER,
    TOKENS,
    VOCABULARY,
    AddedToken,
    TokenizerRecord,
    load_translation_tokenizer,
    write_json,
)

# Files that each tokenizer class needs: one of every tuple.
_FILES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "MarianTokenizer": (("source.spm",), ("target.spm",), ("vocab.json",)),
    "M2M100Tokenizer": (("sentencepiece.bpe.model",), ("vocab.json",)),
    "NllbTokenizer": (("tokenizer.json", "sentencepiece.bpe.model"),),
    "T5Tokenizer": (("tokenizer.json", "spiece.model"),),
    "MBart50Tokenizer": (("tokenizer.json", "sentencepiece.bpe.model"),),
    "BartTokenizer": (("tokenizer.json", "vocab.json"),),
}
# Tokenizer class by model type, for checkpoints that do not name theirs.
_CLASSES = {
    "marian": "MarianTokenizer",
    "m2m_100": "M2M100Tokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "mbart": "MBart50Tokenizer",
    "bart": "BartTokenizer",
}
_PROBES = (
    "", " ", "Hello, world!", "  two  spaces ", "Ça va ?\tL'été\n…", "我爱你。", "مرحبا بالعالم", "नमस्ते", "👩‍👩‍👧 🎉",
    "ﬁ ① Å e\u0301", "a\x00b\x7f", "▁x▁ ▁", "</s> <unk><pad> <s>x</s>", ">>fr<< a >>b<<", "__fr__ fra_Latn", "x" * 300,
)  # fmt: skip


def check_tokenizer_files(checkpoint: Path) -> None:
    """Raise ArtifactError naming the SentencePiece files that a checkpoint lacks, before transformers fails
    obscurely."""
    named = str(_read(checkpoint / "tokenizer_config.json").get("tokenizer_class", "")).removesuffix("Fast")
    kind = named or _CLASSES.get(str(_read(checkpoint / "config.json").get("model_type")), "")
    for names in _FILES.get(kind, ()):
        if not any((checkpoint / name).is_file() for name in names):
            raise ArtifactError(
                f"{checkpoint}: has no {' or '.join(names)}, which its {kind} is made of",
                "copy all files of the checkpoint; SentencePiece models cannot be made again from weights",
            )


def save_translation_tokenizer(checkpoint: Path, tokenizer: Any, folder: Path, *, prefix: str | None = None) -> None:
    """Write the files that ``load_translation_tokenizer`` reads to ``folder``.

    ``prefix`` is put before every source whose language pair has no prefix of its own (T5's ``task_specific_params``,
    the >>code<< of a multilingual Marian). Raises ArtifactError for a checkpoint without its SentencePiece files or
    with an unsupported tokenizer, ExportError if the saved tokenizer does not tokenize as ``tokenizer`` does.
    """
    if checkpoint.is_dir():
        check_tokenizer_files(checkpoint)
    config = _read(checkpoint / "config.json")
    if tokenizer.is_fast:
        record = _save_fast(tokenizer, config, prefix, folder)
    elif hasattr(tokenizer, "spm_source"):
        record = _save_marian(tokenizer, config, prefix, folder)
    elif hasattr(tokenizer, "lang_code_to_id") and hasattr(tokenizer, "sp_model"):
        record = _save_m2m100(tokenizer, config, prefix, folder)
    else:
        raise ArtifactError(
            f"{checkpoint}: {type(tokenizer).__name__} is not supported", f"supported: {', '.join(_FILES)}"
        )
    record.save(folder)
    _check(tokenizer, record, folder)


def _save_fast(tokenizer: Any, config: Mapping[str, Any], prefix: str | None, folder: Path) -> TokenizerRecord:
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    languages: dict[str, int] = {}
    if hasattr(tokenizer, "legacy_behaviour"):  # NLLB
        languages = {t: i for t, i in tokenizer.get_added_vocab().items() if NLLB_CODE.fullmatch(t)}
    elif type(tokenizer).__name__.startswith("MBart50"):
        languages = {str(code): int(i) for code, i in tokenizer.lang_code_to_id.items()}
    place = "after" if getattr(tokenizer, "legacy_behaviour", False) else "before"
    # Hugging Face never cleans up after BPE, even with the flag set.
    cleans = type(tokenizer.backend_tokenizer.model).__name__ != "BPE" or bool(
        tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    )
    return TokenizerRecord(
        "tokenizers",
        int(tokenizer.eos_token_id),
        languages=languages,
        language_place=place if languages else None,
        before=() if languages else tuple(tokenizer("")["input_ids"][:-1]),
        prefixes=task_prefixes(config.get("task_specific_params")),
        prefix=prefix or "",
        clean_up_spaces=cleans and bool(tokenizer.clean_up_tokenization_spaces),
        split_special_tokens=splits_special(tokenizer),
        unk_token=str(tokenizer.unk_token),
    )


def _save_marian(tokenizer: Any, config: Mapping[str, Any], prefix: str | None, folder: Path) -> TokenizerRecord:
    """Save Marian's. With one vocabulary for both sides, transformers 5 decodes with the source's model."""
    (folder / SOURCE_SPM).write_bytes(_model(tokenizer, tokenizer.spm_source))
    decoder = tokenizer.spm_source
    if tokenizer.separate_vocabs:
        decoder = tokenizer.spm_target
        (folder / TARGET_SPM).write_bytes(_model(tokenizer, decoder))

    def token(i: int) -> str:
        """Return an id's token, from the SentencePiece model if the vocabulary lacks it."""
        if i in tokenizer.added_tokens_decoder or i in tokenizer.decoder:
            return str(tokenizer.convert_ids_to_tokens(i))
        return (decoder.id_to_piece(i) if i < len(decoder) else "") or str(tokenizer.unk_token)

    _save_vocabulary(tokenizer, {}, [token(i) for i in range(_size(tokenizer, tokenizer.decoder, config))], folder)
    codes = [str(code) for code in tokenizer.supported_language_codes]
    return _sentencepiece_record(
        tokenizer,
        prefixes={"": {code[2:-2]: f"{code} " for code in codes}} if codes else {},
        prefix=prefix if codes else prefix or "",
        separate_models=bool(tokenizer.separate_vocabs),
        special_gap=" ",
        codes_in_text=True,
    )


def _save_m2m100(tokenizer: Any, config: Mapping[str, Any], prefix: str | None, folder: Path) -> TokenizerRecord:
    (folder / SOURCE_SPM).write_bytes(_model(tokenizer, tokenizer.sp_model))
    size = _size(tokenizer, {**tokenizer.decoder, **tokenizer.id_to_lang_token}, config)
    tokens = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(size)]
    _save_vocabulary(tokenizer, tokenizer.lang_token_to_id, tokens, folder)
    return _sentencepiece_record(
        tokenizer,
        languages={str(code): int(i) for code, i in tokenizer.lang_code_to_id.items()},
        language_place="before",
        prefix=prefix or "",
    )


def _sentencepiece_record(tokenizer: Any, **of_family: Any) -> TokenizerRecord:
    return TokenizerRecord(
        "sentencepiece",
        int(tokenizer.eos_token_id),
        clean_up_spaces=bool(tokenizer.clean_up_tokenization_spaces),
        split_special_tokens=splits_special(tokenizer),
        unk_token=str(tokenizer.unk_token),
        added_tokens=tuple(
            AddedToken(token.content, bool(token.lstrip), bool(token.rstrip), bool(token.single_word))
            for token in tokenizer.added_tokens_decoder.values()
        ),
        special_tokens=tuple(str(token) for token in tokenizer.all_special_tokens),
        special_token_ids=tuple(int(i) for i in tokenizer.all_special_ids),
        **of_family,
    )


def _model(tokenizer: Any, processor: Any) -> bytes:
    if tokenizer.sp_model_kwargs:
        raise ArtifactError(
            f"the tokenizer passes options to SentencePiece ({tokenizer.sp_model_kwargs}), which serving does not",
            "remove sp_model_kwargs from the checkpoint's tokenizer_config.json",
        )
    return bytes(processor.serialized_model_proto())


def _save_vocabulary(tokenizer: Any, languages: Mapping[str, int], tokens: Sequence[str], folder: Path) -> None:
    """Write one vocabulary in place of Hugging Face's three: added tokens win over language tokens, those over pieces.
    ``tokens`` are in the order of their ids, for decoding."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    write_json(folder / VOCABULARY, {**tokenizer.encoder, **languages, **added})
    write_json(folder / TOKENS, list(tokens))


def _size(tokenizer: Any, by_id: Mapping[int, str], config: Mapping[str, Any]) -> int:
    """Return a size above every id that the tokenizer knows or the model can generate."""
    known: int = max([*by_id, *tokenizer.added_tokens_decoder]) + 1
    return max(known, int(config.get("vocab_size") or 0))


def _check(tokenizer: Any, record: TokenizerRecord, folder: Path) -> None:
    """Compare the saved tokenizer with the original on a few difficult strings, to catch unsupported settings."""
    source, target, prefix = "", "", record.prefix or ""
    if record.languages:
        source, target = str(tokenizer.src_lang), next(iter(record.languages))
    elif record.prefixes:
        source, targets = next(iter(record.prefixes.items()))
        target, prefix = next(iter(targets.items()))
    read_as_text(tokenizer)
    saved = load_translation_tokenizer(folder, source, target)
    codes = record.prefixes.get("", {}) if record.codes_in_text else ()
    expected = token_ids(tokenizer, [prefixed(text, prefix, codes) for text in _PROBES])
    ids = saved.encode(_PROBES)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for text, wanted, got, wanted_text, got_text in zip(_PROBES, expected, ids, texts, saved.decode(ids)):
        if wanted != got or wanted_text != got_text:
            raise ExportError(
                f"the saved tokenizer differs from the checkpoint's {type(tokenizer).__name__} on {text!r}:\n"
                f"  ids {got}, expected {wanted}\n  text {got_text!r}, expected {wanted_text!r}",
                "report this with the checkpoint's tokenizer_config.json",
            )


def _read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: is not JSON: {error}", "copy the checkpoint again") from error
    return value if isinstance(value, dict) else {}
