"""Train a tokenizer on training rows: one SentencePiece model and vocabulary for both sides, in opus-mt's files.

opus-mt has a model for each side and a joint vocabulary. A shared one is half as large for the same number of pieces
(the output projection is the largest matrix of a small model), and placeholders, names and markup are the same pieces
on both sides.
"""

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
from deploykit.text import normalize

EOS, UNKNOWN, PAD = "</s>", "<unk>", "<pad>"
_CHARACTERS_PER_PIECE = 20
_SMALLEST = 64
_THREADS = 4
"""Fixed, because floating-point sums depend on the number of threads, and the same rows must give the same pieces."""


def train_tokenizer(
    sources: Sequence[str], targets: Sequence[str], *, languages: tuple[str, str], size: int, max_length: int
) -> Any:
    """Train a MarianTokenizer of about ``size`` pieces, fewer if there is little text.

    Ids are in Marian's order: </s> 0, <unk> 1, the pieces, <pad> last.
    """
    model = _train([normalize(text) for text in (*sources, *targets)], size)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    usable = (i for i in range(pieces.get_piece_size()) if not (pieces.is_control(i) or pieces.is_unknown(i)))
    tokens = [EOS, UNKNOWN, *(pieces.id_to_piece(i) for i in usable), PAD]
    ids = {token: i for i, token in enumerate(tokens)}
    folder = tempfile.TemporaryDirectory()
    with folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a package that it does not use
        files = [Path(folder.name) / name for name in ("source.spm", "target.spm", "vocab.json")]
        for file, data in zip(files, (model, model, json.dumps(ids, ensure_ascii=False).encode())):
            file.write_bytes(data)
        # The files are deleted before it is saved; saving writes the models from memory.
        return MarianTokenizer(
            *map(str, files), source_lang=languages[0], target_lang=languages[1], model_max_length=max_length
        )


def _train(texts: Sequence[str], size: int) -> bytes:
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
        raise DataError(f"no vocabulary can be built from the training rows: {error}", "give more rows") from error
    return model.getvalue()
