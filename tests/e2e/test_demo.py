"""The demos, typed as `make demo` types them, on few rows: to the end, with table and report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from language_models import random_model, tokenizer, write_rows

from deploykit.graphs.gguf_file import write_gguf
from deploykit.tasks.classification.demo import SENTENCES
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.demo import SMOLLM2
from deploykit.tasks.translation.gettext_corpus import CATALOG_WHEELS


def demo(folder: Path, *words: str) -> str:
    """Run a demo to its end, and return what it prints."""
    command = ("-m", "deploykit", "demo", "--output-dir", str(folder), *words)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_demo_ends_with_predictions_a_table_and_a_report(tmp_path: Path, minilm: Path, tweets: Path) -> None:
    for folder, cached in (("minilm", minilm), ("tweets", tweets.parent)):
        shutil.copytree(cached, tmp_path / folder)
    shown = demo(tmp_path, "--max-train-samples", "300", "--seconds", "0.2")
    assert all(sentence in shown for sentence in SENTENCES)
    report = tmp_path / "report.html"
    assert f"open {report}" in shown
    assert "sentences/s" in shown
    for model in ("checkpoint fp32 (", "export INT8 (", "served INT8 ("):
        assert model in shown
    assert "</html>" in report.read_text(encoding="utf-8")


def test_the_demo_of_translation_serves_and_measures_a_new_model(tmp_path: Path) -> None:
    """The pairs are short, so that a model of a few steps ends its translations."""
    pairs = tmp_path / "gettext" / "pairs"
    pairs.mkdir(parents=True)
    verbs = (("Open", "Ouvrir"), ("Save", "Enregistrer"), ("Close", "Fermer"), ("Print", "Imprimer"))
    things = (("file", "le fichier"), ("window", "la page"), ("image", "une image"), ("text", "le texte"))
    rows = [(f"{v} {t} {i}\t{verb} {thing}") for i in range(25) for v, verb in verbs for t, thing in things]
    (pairs / "en-fr.tsv").write_text("\n".join(["en\tfr", *rows]))
    wheels = {f"{wheel.package} {wheel.version} {wheel.sha256}": 0 for wheel in CATALOG_WHEELS}
    (pairs / "counts.json").write_text(json.dumps(wheels))
    shown = demo(tmp_path, "--recipe", "translation", "--max-train-samples", "300", "--seconds", "0.05")
    assert "The file could not be saved.  ->  " in shown
    for model in ("checkpoint fp32 (torch)", "ONNX fp32 (onnxruntime)", "export INT8 (", "served INT8 ("):
        assert model in shown
    assert "chrF" in shown
    assert f"open {tmp_path / 'report-en-fr.html'}" in shown
    assert "</html>" in (tmp_path / "report-en-fr.html").read_text(encoding="utf-8")


def test_the_demo_of_generation_answers_the_openai_client(tmp_path: Path) -> None:
    """A random model of two layers takes the place of SmolLM2, in a file of the same name."""
    model = random_model("llama linear", mlp_bias=False, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    for folder in ("smollm2", "commands/pairs"):
        (tmp_path / folder).mkdir(parents=True)
    write_gguf(model, tokenizer(CHATML), (2, 4), "f16", tmp_path / "smollm2" / Path(SMOLLM2.inside).name)
    write_rows(tmp_path / "commands" / "pairs" / "commands.jsonl")
    shown = demo(tmp_path, "--recipe", "generation", "--max-train-samples", "60", "--seconds", "0.05")
    assert "List all branches of the repository  ->  " in shown
    assert " at once: " in shown
    for model_line in ("checkpoint fp32 (torch)", "ONNX fp32 (onnxruntime)", "export INT8 ("):
        assert model_line in shown
    assert f"open {tmp_path / 'report-commands.html'}" in shown
    assert "</html>" in (tmp_path / "report-commands.html").read_text(encoding="utf-8")
