"""A tokenizer made from training rows: SentencePiece for each side and one vocabulary for both, as opus-mt has them."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import MarianTokenizer

from deploykit.errors import DataError
from deploykit.runtime.text import normalize

EOS, UNKNOWN, PAD = "</s>", "<unk>", "<pad>"
_CHARACTERS_PER_PIECE = 20
_SMALLEST = 64
_THREADS = 4
"""Fixed: sums of floats depend on how many add them up, and the same rows must give the same pieces."""


def train_tokenizer(
    sources: Sequence[str], targets: Sequence[str], *, languages: tuple[str, str], size: int, max_length: int
) -> Any:
    """A MarianTokenizer whose two models have at most ``size`` pieces each, fewer where the text is short.

    Its ids are as Marian numbers them: </s> 0, <unk> 1, the pieces of both sides, <pad> last.
    """
    models = [_train([normalize(text) for text in texts], size, name) for texts, name in ((sources, "source"), (targets, "target"))]  # fmt: skip
    ids = {EOS: 0, UNKNOWN: 1}
    for model in models:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        for i in range(pieces.get_piece_size()):
            if not (pieces.is_control(i) or pieces.is_unknown(i)):
                ids.setdefault(pieces.id_to_piece(i), len(ids))
    ids[PAD] = len(ids)
    folder = tempfile.TemporaryDirectory()
    with folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a package that it then makes no use of
        files = [Path(folder.name) / name for name in ("source.spm", "target.spm", "vocab.json")]
        for file, data in zip(files, [*models, json.dumps(ids, ensure_ascii=False).encode()]):
            file.write_bytes(data)
        # Its files are gone when it is saved; it then writes the models that it holds.
        return MarianTokenizer(
            *map(str, files), source_lang=languages[0], target_lang=languages[1], model_max_length=max_length
        )


def _train(texts: Sequence[str], size: int, side: str) -> bytes:
    characters = sum(map(len, texts))
    alphabet = len(set().union(*texts))
    pieces = max(_SMALLEST, alphabet + 8, min(size, characters // _CHARACTERS_PER_PIECE))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=pieces,
            hard_vocab_limit=False,
            character_coverage=1.0 if alphabet < 1000 else 0.9995,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"no vocabulary can be made of the {side} texts: {error}", "give more rows") from error
    return model.getvalue()
