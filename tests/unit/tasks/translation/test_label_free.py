"""What INT8 loses against fp32, measured without translations of people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploykit.artifacts import load_manifest
from deploykit.graphs.families import read_architecture
from deploykit.graphs.native_writer import save_native
from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
from deploykit.quantization.qdq import Ranges
from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.tasks.translation.calibration import calibrate
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.export import _Grader
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.forced_decoding import divergences, greedy_translations
from deploykit.tasks.translation.pairs import Pair
from deploykit.tasks.translation.predictor import load_translator

TEXTS = [
    "Save the file.",
    "Do you want to open 3 folders, {name}?",
    "The quick brown fox jumps over the lazy dog.",
    "Yes",
]


@pytest.fixture(scope="module")
def checkpoint(make_tiny_translation: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label-free")
    make_tiny_translation(folder / "export", max_length=32, keep_checkpoint=folder / "checkpoint")
    return folder / "checkpoint"


def test_divergence_is_that_of_the_distributions_token_by_token(
    tiny_translation: Path, make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    task = load_manifest(tiny_translation, verify=False).task
    assert isinstance(task, Translation)
    files = TRANSLATION_FILES["fp32"]
    other = make_tiny_translation(tmp_path / "other", seed=1)
    pairs = greedy_translations(load_translator(tiny_translation, task, files, 1), TEXTS)
    model, reference = Seq2SeqModel(other, files, 1), Seq2SeqModel(tiny_translation, files, 1)
    found = divergences(model, reference, task, pairs)
    assert (model.rows, reference.rows) == (0, 0)
    expected = []
    for pair in pairs:
        for each in (model, reference):
            each.admit(each.encode([pair.source]), [len(pair.source)], [1])
        for token in [task.decoder_start_token_id, *pair.target[:-1]]:
            q, p = (np.exp(each.step(np.array([token]))[0].astype(np.float64)) for each in (model, reference))
            q, p = q / q.sum(), p / p.sum()
            expected.append((p * np.log(p / q)).sum())
        for each in (model, reference):
            each.remove(np.arange(1))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert found.min() > 0
    np.testing.assert_allclose(
        divergences(reference, Seq2SeqModel(tiny_translation, files, 1), task, pairs), 0, atol=1e-9
    )


def test_a_ruined_form_diverges_and_a_good_one_does_not(checkpoint: Path) -> None:
    reference = TorchTranslator.load(checkpoint, source="en", target="fr")
    architecture, task = read_architecture(reference.model), reference.task
    export = checkpoint.parent / "export"
    texts = [*TEXTS, *(f"Open {i} files" for i in range(8))]
    said = [one.text for one in reference.translate(texts)]
    grader = _Grader(export, task, [Pair(text, right, "") for text, right in zip(texts, said)])
    grader.grade_checkpoint(reference)
    ranges = calibrate(export, task, texts).ranges("minmax")

    def losses(some: Ranges) -> float:
        save_graphs(
            export, build_encoder(architecture, some), build_decoder(architecture, some), TRANSLATION_FILES["int8"]
        )
        save_native(export / NATIVE_FILE, architecture, some)
        line = grader.grade("int8")
        assert line.without_labels is not None
        return line.without_labels()

    lost = losses(ranges)
    lost_by_coarse_steps = losses({name: (10 * low, 10 * high) for name, (low, high) in ranges.items()})
    assert 0 < lost < 1
    assert lost_by_coarse_steps > 5
    if not lacks():  # it rounds activations as they come, so only the other engine's form is ruined, and counts
        assert grader.lost_without_labels([NATIVE_FILE], "native") < 1
