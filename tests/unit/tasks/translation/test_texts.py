"""Preprocessing of a translator: target codes, special tokens, sentences, and blank texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.data.answer_file import answer_file
from deploykit.data.texts import TextRow
from deploykit.errors import ArtifactError, DataError
from deploykit.runtime.generation import Generation
from deploykit.stages.finetune_options import make_options
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer
from deploykit.tasks.translation.new_marian import new_marian
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.predictor import Translator, load_translator
from deploykit.tasks.translation.presets import PRESETS
from deploykit.tasks.translation.sentences import split_lines
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
from deploykit.tasks.translation.training import TranslationStage
from deploykit.tasks.translation.translated import EMPTY
from deploykit.tasks.translation.vocabulary import train_tokenizer
from deploykit.text import is_blank
from deploykit.training.checkpoint import quiet

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

SOURCES = [f"open the {thing} number {i} of %s" for i in range(40) for thing in ("file", "folder", "user", "network")]
BLANK = ("\u200b", "\ufeff", "\u00ad", "\u200e\u200f", "\u2060 \u200b", "\x00\x07", "\u3164", "\ufe0f", " \n ")


def write_marian(folder: Path, *codes: str) -> Path:
    """Write a new marian-tiny; with ``codes`` a multilingual one."""
    quiet()
    options = make_options(
        {"task": "translation", "train": "x", "source_lang": "en", "target_lang": "fr", "from_config": "marian-tiny"}
    )
    assert isinstance(options, TranslationOptions)
    torch.manual_seed(3)
    tokenizer = train_tokenizer(SOURCES, SOURCES[::2], languages=("en", "fr"), size=200, max_length=64)
    model = new_marian(PRESETS["marian-tiny"], tokenizer, options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.5)
    if codes:
        model.resize_token_embeddings(len(tokenizer) + len(codes))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if codes:
        ids = json.loads((folder / "vocab.json").read_text())
        tokens = [*list(ids), *(f">>{code}<<" for code in codes)]
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marian(tmp_path_factory.mktemp("multi") / "m", "fra", "deu")


@pytest.fixture(scope="module")
def to_french(multi: Path) -> TorchTranslator:
    return TorchTranslator.load(multi, source="en", target="fra")


@pytest.fixture(scope="module")
def served(tiny_translation: Path) -> Translator:
    from deploykit.artifacts import load_manifest
    from deploykit.runtime.engines import TRANSLATION_FILES
    from deploykit.tasks.translation.facts import Translation

    task = load_manifest(tiny_translation).task
    assert isinstance(task, Translation)
    return load_translator(tiny_translation, task, TRANSLATION_FILES["fp32"], 1)


def test_a_leading_code_that_the_model_knows_is_the_target(multi: Path, to_french: TorchTranslator) -> None:
    to_german = TorchTranslator.load(multi, source="en", target="deu")
    texts = ["open the file", "open the folder. open the user."]
    few = Generation(max_length=12)
    coded = [f">>deu<< {text}" for text in texts]
    assert to_french.encode(coded) == to_german.encode(texts) != to_french.encode(texts)
    assert to_french.translate(coded, few) == to_german.translate(texts, few), "each sentence has the code"
    assert to_french.translate([">>fra<<open the file"], few) == to_french.translate(["open the file"], few)


def test_the_serving_tokenizer_reads_the_same_code(multi: Path, to_french: TorchTranslator, tmp_path: Path) -> None:
    save_translation_tokenizer(multi, to_french.tokenizer, tmp_path, prefix=">>fra<< ")
    saved = load_translation_tokenizer(tmp_path, "en", "fra")
    texts = ["open", ">>deu<< open", ">>fra<<open", ">>deu<< a >>fra<< b", "a >>deu<< b", "</s> open <pad>"]
    assert saved.encode(texts) == to_french.encode(texts)


@pytest.mark.parametrize("text", [">>spa<< open the file", " >>xx<<open"])
def test_a_code_that_the_model_lacks_is_refused_with_those_it_has(to_french: TorchTranslator, text: str) -> None:
    with pytest.raises(DataError) as error:
        to_french.translate(["open", text])
    assert "text 1: begins with >>" in str(error.value)
    assert "deu, fra" in str(error.value)


def test_training_rows_may_have_codes_that_the_model_knows(multi: Path) -> None:
    from deploykit.tasks.translation.rows import Pair

    options = make_options({"task": "translation", "train": "x", "model": str(multi), "source_lang": "en", "target_lang": "fra",
                            "max_length": 64})  # fmt: skip
    assert isinstance(options, TranslationOptions)
    stage = TranslationStage(options)
    stage.check({"train": [Pair(">>deu<< open", "öffnen", "a.tsv:2"), Pair("open", "ouvrir", "a.tsv:3")]})
    with pytest.raises(DataError, match=r"a\.tsv:4: the source begins with >>spa<<.*"):
        stage.check({"train": [Pair(">>spa<< open", "abrir", "a.tsv:4")]})


def test_in_a_model_of_one_pair_codes_and_special_tokens_are_text(tmp_path: Path) -> None:
    folder = write_marian(tmp_path / "m")
    translator = TorchTranslator.load(folder)
    tokenizer = translator.tokenizer
    (tmp_path / "saved").mkdir()
    save_translation_tokenizer(folder, tokenizer, tmp_path / "saved")
    texts = [">>deu<< open", "open </s> the <pad> file <unk>", "</s>"]
    for ids, text in zip(translator.encode(texts), texts):
        pieces = [tokenizer.convert_tokens_to_ids(piece) for piece in tokenizer.spm_source.encode(text, out_type=str)]
        assert ids == [*pieces, tokenizer.eos_token_id]
    assert load_translation_tokenizer(tmp_path / "saved", "en", "fr").encode(texts) == translator.encode(texts)
    targets = translator.encode_targets(texts)
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in targets)


@pytest.mark.parametrize("text", BLANK)
def test_a_blank_text_has_an_empty_translation(served: Translator, to_french: TorchTranslator, text: str) -> None:
    assert is_blank(text)
    assert served.translate([text, "open"])[0] == EMPTY
    assert to_french.translate([text], Generation(max_length=8)) == [EMPTY]
    assert to_french.translate([f">>deu<< {text}"], Generation(max_length=8)) == [EMPTY]


def test_a_text_without_tokens_has_an_empty_translation(served: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SentencePiece model's normalization may remove a whole text."""
    encode = served._tokenizer.encode
    monkeypatch.setattr(served._tokenizer, "encode", lambda texts: encode([text.replace("¤", "") for text in texts]))
    assert served.translate(["¤¤"]) == [EMPTY]


def test_each_sentence_is_translated_and_line_ends_are_kept(served: Translator) -> None:
    text = "Save the file. Close the window!\n\nOpen 3 folders?\n\u200b\nYes."
    sentences = ["Save the file.", "Close the window!", "Open 3 folders?", "Yes."]
    alone = [translated.text for translated in served.translate(sentences)]
    [whole] = served.translate([text])
    assert whole.text == f"{alone[0]} {alone[1]}\n\n{alone[2]}\n\n{alone[3]}"
    lines = ["Save the file. Close the window!", *sentences[2:]]
    by_line = [translated.text for translated in served.translate(lines, split="none")]
    [paragraphs] = served.translate([text], split="paragraph")
    assert paragraphs.text == "\n\n".join(by_line)
    assert served.translate([text], split="none")[0].source_tokens != whole.source_tokens


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab.!? \n\r\t\u2028\x0b"), max_size=30))
def test_lines_joined_are_the_text(text: str) -> None:
    assert "".join(line + after for line, after in split_lines(text)) == text
    assert not any(set(line) & set("\n\r\u2028\x0b") for line, _ in split_lines(text))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*BLANK, "", "Save.", "Save. Close!\nYes", "</s>", ">>xx<< a", "fox", "jumps over " * 40]),
                max_size=6))  # fmt: skip
def test_a_texts_answer_does_not_depend_on_the_batch(served: Translator, texts: list[str]) -> None:
    few = Generation(max_length=6, no_repeat_ngram_size=2)
    assert served.translate(texts, few) == [served.translate([text], few)[0] for text in texts]


def test_unfinished_output_of_another_model_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    out = tmp_path / "o[1].jsonl"
    rows = [TextRow(f"r{i}", str(i), None) for i in range(600)]

    def run(model: str, stop: int | None = None, *, force: bool = False) -> Any:
        def answer(part: Any) -> Any:
            if stop is not None and part[0].origin == f"r{stop}":
                raise KeyboardInterrupt
            return [{"origin": row.origin, "by": model} for row in part]

        return answer_file(
            lambda: iter(rows),
            lambda parts: map(answer, parts),
            out,
            key=model * 20,
            on_error="skip",
            force=force,
            progress=lambda *_: None,
        )

    with pytest.raises(KeyboardInterrupt):
        run("a", 512)
    with pytest.raises(ArtifactError, match="512 rows of it, from another model"):
        run("b")
    assert not out.exists()
    assert run("b", force=True).resumed == 0
    assert {json.loads(line)["by"] for line in out.read_text().splitlines()} == {"b"}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_replaced_model_has_another_identity(make_tiny_translation: Callable[..., Path], tmp_path: Path) -> None:
    from deploykit.tasks.opening import identity_of, open_predictor

    folders = [make_tiny_translation(tmp_path / str(seed), seed=seed, max_length=16) for seed in (0, 1)]
    first = identity_of(str(folders[0]), open_predictor(str(folders[0]), url=""))
    folders[0].rename(tmp_path / "old")
    folders[1].rename(folders[0])
    assert identity_of(str(folders[0]), open_predictor(str(folders[0]), url="")) != first
