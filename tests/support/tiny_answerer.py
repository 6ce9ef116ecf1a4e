"""Random models for question answering of several families, and tokenizers that know a few words and all letters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from answering_families import write_answerer

WORDS = tuple(f"w{i}" for i in range(200))
FAMILIES = ("bert", "distilbert", "electra", "roberta", "deberta-v2", "albert")
CONTEXT = "The w1 river 😀 rises in w2. Ein Café steht dort — e\u0301tape  w3!\r\n它在北京。 １２３ end w4"


def write_checkpoint(folder: Path, family: str = "bert", *, sharp: bool = False, length: int = 64) -> Path:
    """Write a random two-layer model of ``family`` for windows of up to ``length`` tokens; ``sharp`` spreads its logits."""
    tokenizer, special = _tokenizer(family)
    write_answerer(folder, family, tokenizer, special, length=length, sharp=sharp)
    return folder


def write_export(folder: Path) -> Path:
    """Export a random BERT, in fp32."""
    from deploykit.graphs.export_options import ExportOptions
    from deploykit.stages.export import export

    folder.mkdir()
    checkpoint, rows = write_checkpoint(folder / "checkpoint", sharp=True), write_squad(folder / "rows.json")
    options = ExportOptions(data=str(rows), max_drop=100)
    return export(checkpoint, folder / "export", options, say=lambda line: None).path


def squad(contexts: int = 8, questions: int = 2) -> dict[str, Any]:
    """Return questions whose answer is the one word of the context that is among the last ten, in SQuAD's JSON."""
    chosen = random.Random(0)
    paragraphs = []
    for c in range(contexts):
        words = chosen.choices(WORDS[:-10], k=50)
        at = chosen.randrange(50)
        words[at] = WORDS[-1 - c % 10]
        answers = [{"text": words[at], "answer_start": len(" ".join([*words[:at], ""]))}]
        qas = [{"id": f"{c}-{q}", "question": f"which one ? {WORDS[q]}", "answers": answers} for q in range(questions)]
        paragraphs.append({"context": " ".join(words), "qas": qas})
    return {"version": "1.1", "data": [{"title": "words", "paragraphs": paragraphs}]}


def write_squad(path: Path, contexts: int = 8, questions: int = 2) -> Path:
    path.write_text(json.dumps(squad(contexts, questions)), encoding="utf-8")
    return path


def _tokenizer(family: str) -> tuple[Any, tuple[str, str, str, str]]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = sorted(
        {*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!—", *CONTEXT} - {" ", "\r", "\n"}
    )
    if family == "roberta":
        special = ("<pad>", "<unk>", "<s>", "</s>")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("w", "1"), ("Ġ", "w"), ("Ġ", "e"), ("Ġ", "T")]
        pieces = [*special, *alphabet, *("".join(pair) for pair in merges)]
        tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), add_prefix_space=False)
        return tokenizer, special
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    if family in ("deberta-v2", "albert"):
        scored = [(token, 0.0) for token in special]
        scored += [(piece, -1.0) for piece in ("▁", *(f"▁{word}" for word in WORDS), "▁The", "▁end")]
        scored += [(letter, -3.0) for letter in letters]
        tokenizer = Tokenizer(models.Unigram(scored, 1, byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        pieces = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
        tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer, special
