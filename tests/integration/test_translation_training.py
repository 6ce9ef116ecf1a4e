"""Vocabularies, batches by tokens, and the PyTorch translator, on random models."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.generation import Generation
from deploykit.stages.finetune_options import make_options
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.new_marian import new_marian
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.presets import PRESETS
from deploykit.tasks.translation.token_batches import TokenBatches
from deploykit.tasks.translation.translated import finish_of
from deploykit.tasks.translation.vocabulary import train_tokenizer
from deploykit.training.source import check_source

SOURCES = [f"open the {thing} number {i} of %s" for i in range(40) for thing in ("file", "folder", "user", "network")]
TARGETS = [f"ouvrir le {thing} numéro {i} de %s" for i in range(40) for thing in ("fichier", "dossier", "client")]


def new_tokenizer(size: int = 200) -> Any:
    return train_tokenizer(SOURCES, TARGETS, languages=("en", "fr"), size=size, max_length=64)


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new marian-tiny with weights large enough that outputs depend on inputs."""
    options = make_options(
        {"task": "translation", "train": "x", "source_lang": "en", "target_lang": "fr", "from_config": "marian-tiny"}
    )
    assert isinstance(options, TranslationOptions)
    torch.manual_seed(3)
    tokenizer = new_tokenizer()
    model = new_marian(PRESETS["marian-tiny"], tokenizer, options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.5)
        model.final_logits_bias.normal_()
    return save(tmp_path_factory.mktemp("marian") / "m", model, tokenizer)


@pytest.fixture(scope="module")
def m2m100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import M2M100Config, M2M100ForConditionalGeneration, M2M100Tokenizer

    folder = tmp_path_factory.mktemp("m2m100")
    marian = new_tokenizer()
    marian.save_pretrained(folder / "parts")
    pieces = [p for p in json.loads((folder / "parts" / "vocab.json").read_text()) if not p.startswith("<")]
    ids = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    (folder / "ids.json").write_text(json.dumps(ids))
    tokenizer = M2M100Tokenizer(str(folder / "ids.json"), str(folder / "parts" / "source.spm"))
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=max(tokenizer.lang_token_to_id.values()) + 1, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3,
        max_position_embeddings=64, pad_token_id=1, eos_token_id=2, bos_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    return save(folder / "m", M2M100ForConditionalGeneration(config), tokenizer)


def test_a_vocabulary_is_numbered_as_marians_and_the_same_rows_give_the_same(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    ids = tokenizer.get_vocab()
    assert (ids["</s>"], ids["<unk>"], ids["<pad>"]) == (0, 1, len(ids) - 1)
    assert sorted(ids.values()) == list(range(len(ids)))
    again = new_tokenizer()
    for each, name in ((tokenizer, "a"), (again, "b")):
        each.save_pretrained(tmp_path / name)
    for file in ("source.spm", "target.spm", "vocab.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    encoded = tokenizer(text_target=TARGETS[0])["input_ids"]
    assert encoded[-1] == 0
    assert tokenizer.decode(encoded, skip_special_tokens=True) == TARGETS[0]


def test_a_vocabulary_is_no_larger_than_asked_and_small_text_gives_a_small_one() -> None:
    assert len(new_tokenizer(100)) <= 100
    assert len(train_tokenizer(["a b"], ["c d"], languages=("x", "y"), size=32000, max_length=8)) < 70


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed() -> None:
    lengths = [1 + (i * 7919) % 60 for i in range(500)]
    batches = TokenBatches(lengths, 128, seed=1)
    seen = list(batches)
    assert sorted(row for batch in seen for row in batch) == list(range(500))
    assert max(len(batch) * max(lengths[row] for row in batch) for batch in seen) <= 128
    assert len(seen) == len(batches)
    assert sum(len(batch) * max(lengths[row] for row in batch) for batch in seen) < 1.1 * sum(lengths), "little padding"


def test_batches_are_drawn_anew_for_each_epoch_and_the_same_when_it_is_repeated() -> None:
    batches = TokenBatches([5, 5, 5, 5, 9, 9, 9, 9] * 20, 20, seed=0)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert first != second
    assert len(first) == len(second)
    batches.set_epoch(0)
    assert list(batches) == first


def test_processes_share_the_batches_and_take_as_many_steps() -> None:
    lengths = [1 + (i * 7919) % 60 for i in range(500)]
    whole = list(TokenBatches(lengths, 128, seed=1))
    parts = [TokenBatches(lengths, 128, seed=1, process=i, processes=3) for i in range(3)]
    turns = list(zip(*map(list, parts), strict=True))
    assert len(turns) == len(parts[0]) == -(-len(whole) // 3)
    taken = [batch for turn in turns for batch in turn]
    assert taken[: len(whole)] == whole
    assert all(row < 0 for batch in taken[len(whole) :] for row in batch), "no row is learned twice"


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.6])
def test_scores_are_those_of_hugging_face(marian: Path, beam: int, length_penalty: float) -> None:
    translator = TorchTranslator.load(marian)
    generation = dataclasses.replace(
        translator.task.generation, beam_size=beam, max_length=24, length_penalty=length_penalty
    )
    for answer, text in zip(translator.translate(SOURCES[:12], generation), SOURCES):
        ids = torch.tensor(translator.encode([text]))
        output = translator.model.generate(
            input_ids=ids, num_beams=beam, max_length=24, length_penalty=length_penalty, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        generated = output.sequences[0, 1:]
        assert answer.target_tokens == len(generated)
        if beam > 1:
            expected = float(output.sequences_scores[0])
        else:
            steps = [step[0].log_softmax(-1)[token] for step, token in zip(output.scores, generated.tolist())]
            # The last one is forced where the limit ended it.
            steps = steps[:-1] if answer.finish == "length" else steps
            expected = float(sum(steps)) / len(generated) ** length_penalty
        assert answer.score == pytest.approx(expected, abs=2e-3)
        assert answer.text == translator.tokenizer.decode(generated, skip_special_tokens=True)


def test_a_translation_does_not_depend_on_its_batch_mates(marian: Path) -> None:
    translator = TorchTranslator.load(marian)
    generation = dataclasses.replace(translator.task.generation, max_length=20)
    texts = [SOURCES[0], "", SOURCES[1] * 4, "file", "  "]
    together = translator.translate(texts, generation)
    alone = [translator.translate([text], generation)[0] for text in texts]
    assert [t.text for t in together] == [t.text for t in alone]
    assert [t.score for t in together] == pytest.approx([t.score for t in alone], abs=1e-4)
    assert together[1] == together[4] == alone[1]
    assert (together[1].text, together[1].target_tokens) == ("", 0)


def test_the_given_search_replaces_the_checkpoints_default(marian: Path) -> None:
    translator = TorchTranslator.load(marian)
    own = translator.model.generation_config
    pad = translator.task.pad_token_id
    assert translator.task.generation.bad_words == ((pad,),)
    free = Generation(max_length=12, forced_bos_token_id=5, no_repeat_ngram_size=1)
    (ids,) = translator.generate_ids(translator.encode(["open"]), free)
    assert ids[0] == 5
    assert len(set(ids)) == len(ids)
    assert translator.model.generation_config is own


@pytest.mark.parametrize(
    ("ids", "forced", "finish"),
    [
        ([5, 6, 0], None, "eos"),
        ([5, 6, 7], None, "length"),
        ([5, 6, 7, 8, 0], 0, "length"),
        ([5, 6, 7, 8, 0], None, "eos"),
    ],
)
def test_why_decoding_ended(ids: list[int], forced: int | None, finish: str) -> None:
    assert finish_of(ids, Generation(max_length=6, forced_eos_token_id=forced), (0,)) == finish


def test_m2m100_takes_its_languages_as_tokens(m2m100: Path) -> None:
    translator = TorchTranslator.load(m2m100, source="en", target="fr")
    codes = translator.tokenizer.lang_code_to_id
    assert translator.task.generation.forced_bos_token_id == codes["fr"]
    assert {"en", "fr", "zu"} <= set(translator.task.languages)
    assert translator.encode(["open"])[0][0] == codes["en"]
    assert translator.encode_targets(["ouvrir"])[0][0] == codes["fr"]
    (ids,) = translator.generate_ids(
        translator.encode(["open"]), dataclasses.replace(translator.task.generation, max_length=8)
    )
    assert ids[0] == codes["fr"]


@pytest.mark.parametrize(
    ("languages", "named"),
    [
        ({"source": "en", "target": "tlh"}, "--target-lang tlh"),
        ({"source": "klingon", "target": "fr"}, "--source-lang klingon"),
        ({"source": "fr", "target": "fr"}, "both fr"),
        ({}, "give --source-lang and --target-lang"),
    ],
)
def test_a_language_the_checkpoint_does_not_know(m2m100: Path, languages: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError) as error:
        TorchTranslator.load(m2m100, **languages)
    assert named in str(error.value)


def test_marian_of_many_targets_wants_a_code_before_the_text(marian: Path, tmp_path: Path) -> None:
    from transformers import MarianMTModel

    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(tmp_path / "parts")
    ids = json.loads((tmp_path / "parts" / "vocab.json").read_text())
    tokens = [*list(ids)[:-3], ">>fra<<", ">>deu<<", "<pad>"]
    model = MarianMTModel.from_pretrained(marian)
    folder = save(tmp_path / "m", model, tokenizer)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    translator = TorchTranslator.load(folder, source="en", target="deu")
    assert translator.task.languages == ("fra", "deu")
    assert translator.encode(["open"])[0][0] == tokens.index(">>deu<<")
    with pytest.raises(UsageError, match="fra, deu"):
        TorchTranslator.load(folder, source="en", target="spa")


def test_t5_is_told_what_to_do_in_words(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in ("translate", "English", "to", "French:", "German:", "open", "file")]
    tokenizer = T5Tokenizer(pieces)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)  # fmt: skip
    folder = save(tmp_path / "m", T5ForConditionalGeneration(config), tokenizer)
    translator = TorchTranslator.load(folder, source="en", target="fr")
    assert translator.tokenizer.decode(translator.encode(["open file"])[0]).startswith(
        "translate English to French: open file"
    )
    assert translator.translate(["open"], Generation(max_length=4))[0].target_tokens <= 3


def test_a_marian_folder_without_sentencepiece_files_is_refused(marian: Path, copy: Callable[[Path], Path]) -> None:
    folder = copy(marian)
    (folder / "target.spm").unlink()
    with pytest.raises(ArtifactError, match=r"has no target\.spm"):
        check_source(str(folder), "translation")


def test_a_checkpoint_of_another_task_is_refused(marian: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="made for translation"):
        check_source(str(marian), "classification")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match="bert, which does not translate"):
        check_source(str(tmp_path), "translation")


def with_search(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_no_repeat_ngram_size", 3), ("force_words_ids", [[5]]), ("stop_strings", ["x"]), ("num_beam_groups", 2),
        ("diversity_penalty", 0.5), ("penalty_alpha", 0.6), ("begin_suppress_tokens", [7]), ("max_time", 1.0),
    ],
)  # fmt: skip
def test_an_unsupported_generation_config_is_refused(
    marian: Path, copy: Callable[[Path], Path], field: str, value: object
) -> None:
    folder = with_search(copy(marian), **{field: value})
    with pytest.raises(ArtifactError, match=f"sets {field}, which deploykit's decoding does not support"):
        TorchTranslator.load(folder)


def test_sampling_is_logged_and_ignored(
    marian: Path, copy: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_search(copy(marian), do_sample=True, top_k=5, temperature=0.7, max_new_tokens=9)
    translator = TorchTranslator.load(folder)
    assert "sets sampling (do_sample); deploykit uses greedy search" in caplog.text
    ids = translator.encode(SOURCES[:4])
    assert translator.generate_by_own(ids) == translator.generate_ids(ids, translator.task.generation)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 7}, {"max_new_tokens": 9, "min_new_tokens": 9}, {"max_length": 8, "min_length": 8},
        {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True, "max_length": 12},
    ],
)  # fmt: skip
def test_the_checkpoints_own_limits_are_kept(
    marian: Path, copy: Callable[[Path], Path], fields: dict[str, object]
) -> None:
    translator = TorchTranslator.load(with_search(copy(marian), **fields))
    generation = translator.task.generation
    ids = translator.encode(SOURCES[:2])
    expected = translator.generate_by_own(ids)
    assert expected == translator.generate_ids(ids, generation)
    assert [len(row) for row in expected] == [t.target_tokens for t in translator.translate(SOURCES[:2])]
    if fields.get("max_new_tokens", 100) in (7, 9):
        assert max(map(len, expected)) == fields["max_new_tokens"]


@pytest.mark.parametrize(
    "fields",
    [{"early_stopping": True, "length_penalty": 0.6}, {"num_beams": 5, "early_stopping": True}, {"top_p": 0.5}],
)
def test_a_checkpoint_with_any_generation_config_is_trained_and_saved(
    marian: Path, copy: Callable[[Path], Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    from deploykit.stages.finetune import finetune

    folder = with_search(copy(marian), max_length=8, **fields)
    rows = [f"{source}\t{target}" for source, target in zip(SOURCES, TARGETS)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["en\tfr", *rows]))
    given = {
        "task": "translation",
        "train": str(tmp_path / "pairs.tsv"),
        "model": str(folder),
        "source_lang": "en",
        "target_lang": "fr",
    }
    options = make_options({**given, "max_steps": 1, "max_train_samples": 20, "max_length": 64, "eval_steps": 1})
    done = finetune(options, tmp_path / "out", say=lambda line: None)
    generation = done.manifest.task.generation  # type: ignore[union-attr]
    for field, value in {**fields, "beam_size": fields.get("num_beams", 1)}.items():
        assert getattr(generation, field, value) == value
    assert TorchTranslator.load(tmp_path / "out").task.generation == generation


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a checkpoint, so that a test may damage it."""
    import shutil

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copied


def test_loading_a_tokenizer_does_not_advertise_packages(marian: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TorchTranslator.load(marian)
