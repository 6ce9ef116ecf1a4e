"""Random checkpoints of several families for question answering, with tokenizers trained on given texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAMILIES = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert")
_VOCABULARY = 4000


def write_family(folder: Path, family: str, texts: Sequence[str], *, length: int = 384) -> Path:
    """Write a two-layer model of ``family`` with random weights and sharp logits, and its tokenizer, to ``folder``."""
    tokenizer, special = _trained(family, texts)
    write_answerer(folder, family, tokenizer, special, length=length, sharp=True)
    settings = folder / "tokenizer_config.json"  # with the class name that transformers 4 and 5 both know
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return folder


def write_answerer(
    folder: Path, family: str, tokenizer: Any, special: Sequence[str], *, length: int, sharp: bool
) -> None:
    """Write a random two-layer model for windows of up to ``length`` tokens, and its ``tokenizer``.

    ``special``: the tokens for padding, unknown pieces, the beginning and the separator. ``sharp`` spreads the logits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    types = ["token_type_ids"] if family in ("bert", "electra") else []
    # ALBERT's tokenizer does not say which inputs it gives.
    listed = {} if family == "albert" else {"model_input_names": ["input_ids", *types, "attention_mask"]}
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=length, **names, **listed
    ).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": length + 8, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    if family == "distilbert":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if family in ("electra", "albert"):
        sizes["embedding_size"] = 32
    if family == "deberta-v2":
        sizes |= {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                  "position_biased_input": False}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(family, **sizes))
    if sharp:
        with torch.no_grad():
            model.qa_outputs.weight *= 4
    model.save_pretrained(folder)


def _trained(family: str, texts: Sequence[str]) -> tuple[Any, tuple[str, str, str, str]]:
    """Return a tokenizer as the family has: WordPiece, byte-level BPE, or Unigram; and its special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    if family == "roberta":
        special = ("<pad>", "<unk>", "<s>", "</s>")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: Any = trainers.BpeTrainer(
            vocab_size=_VOCABULARY, special_tokens=list(special), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), add_prefix_space=False)
        return tokenizer, special
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    if family in ("deberta-v2", "albert"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=_VOCABULARY, special_tokens=list(special), unk_token="[UNK]", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=_VOCABULARY, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer, special
