"""R-Drop of translators."""

from __future__ import annotations

from pathlib import Path

import torch

from deploykit.stages.finetune import finetune
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.pairs import Pair
from deploykit.tasks.translation.token_batches import EncodedPairs
from deploykit.training.losses import divergence

PAIRS = [
    (f"{deed} the {thing} number {i}", f"{verbe} le {chose} numéro {i}")
    for i in range(12)
    for deed, verbe in (("open", "ouvrir"), ("close", "fermer"), ("copy", "copier"))
    for thing, chose in (("file", "fichier"), ("folder", "dossier"), ("note", "billet"))
]


def _apart(run: Path) -> float:
    """Return the divergence of two passes with different dropout, for a target token."""
    translator = TorchTranslator.load(run)
    rows = EncodedPairs(translator, [Pair(*pair, "") for pair in PAIRS[:40]])
    batch = rows.collate(rows.rows)
    known = batch.pop("labels") != -100
    model = translator.model.train()
    torch.manual_seed(5)
    with torch.no_grad():
        first, second = (model(**batch).logits[known] for _ in range(2))
    return float(divergence(first, second)) / int(known.sum())


def test_r_drop_makes_passes_with_different_dropout_agree(tmp_path: Path) -> None:
    rows = tmp_path / "pairs.tsv"
    rows.write_text("en\tfr\n" + "".join(f"{source}\t{target}\n" for source, target in PAIRS), encoding="utf-8")
    after = {}
    for weight in (0.0, 5.0):
        options = TranslationOptions(
            train=str(rows), from_config="marian-tiny", source_lang="en", target_lang="fr", vocabulary=200, max_steps=60, eval_steps=60,
            learning_rate=3e-3, dropout=0.3, r_drop=weight, validation_fraction=0.0, test_fraction=0.1, max_length=32,
        )  # fmt: skip
        run = finetune(options, tmp_path / str(weight), say=lambda _: None)
        after[weight] = _apart(run.path)
    assert after[5.0] < 0.7 * after[0.0]
