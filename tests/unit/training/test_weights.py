"""Loading checkpoints: every weight comes from the file, or the checkpoint is refused naming the keys."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploykit.artifacts import write_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.stages.finetune_options import make_options
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.facts import Classification
from deploykit.training.checkpoint import load_config, load_for_training, load_model, quiet
from deploykit.training.source import check_source
from deploykit.training.trainer import with_adapter
from deploykit.training.weights import local_folder

Tensors = dict[str, torch.Tensor]
Rewrite = Callable[[Path, Callable[[Tensors], Mapping[str, torch.Tensor]]], Path]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, make_tiny_checkpoint: Callable[..., Path]) -> Path:
    quiet()
    return make_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "bert")


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian with a logits bias, an untied head, and tokenizer files."""
    from transformers import MarianConfig, MarianMTModel

    quiet()
    folder = tmp_path_factory.mktemp("weights") / "marian"
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=40, decoder_vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=39,
        eos_token_id=0, decoder_start_token_id=39, tie_word_embeddings=False, init_std=0.3,
    )  # fmt: skip
    model = MarianMTModel(config)
    model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    for name in ("source.spm", "target.spm", "vocab.json"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """Copy a checkpoint with changed tensors."""

    def rewritten(folder: Path, change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> Path:
        copied = Path(shutil.copytree(folder, tmp_path / "rewritten"))
        tensors = {key: value.clone() for key, value in change(load_file(folder / "model.safetensors")).items()}
        save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        return copied

    return rewritten


def refusal(folder: Path, task: str) -> str:
    with pytest.raises(ArtifactError) as error:
        load_model(str(folder), task)
    return str(error.value)


def equal(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_quantized_weights_are_refused_by_their_method(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, dict)
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(ArtifactError) as refused:
        load_model(str(folder))
    assert "quantization_config in config.json: gptq" in refused.value.message
    assert "take quantization_config out" in refused.value.remedy


def test_a_model_that_labels_tokens_is_no_classifier_of_texts(tmp_path: Path) -> None:
    """ModernBERT's two heads have the same keys and shapes."""
    from transformers import ModernBertConfig, ModernBertForTokenClassification

    config = ModernBertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0,
        max_position_embeddings=16,
    )  # fmt: skip
    ModernBertForTokenClassification(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    assert "it is a ModernBertForTokenClassification" in refusal(tmp_path, "classification")
    assert load_for_training(str(tmp_path)).model is not None


def test_an_output_layer_without_weights_may_share_the_embedding_s(marian: Path, rewrite: Rewrite) -> None:
    folder = rewrite(marian, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(ArtifactError) as refused:
        load_model(str(folder), "translation")
    assert "missing from model.safetensors: lm_head.weight" in refused.value.message
    assert refused.value.remedy.startswith("set tie_word_embeddings to true if they are those of the embedding")


@pytest.mark.parametrize("cut", ["model.decoder.layers.1.", "final_logits_bias", "lm_head.weight"])
def test_a_translator_that_lacks_weights_is_refused_with_their_keys(marian: Path, rewrite: Rewrite, cut: str) -> None:
    folder = rewrite(marian, lambda w: {key: value for key, value in w.items() if not key.startswith(cut)})
    assert cut.rstrip(".") in refusal(folder, "translation")


@pytest.mark.parametrize(
    "constant",
    [
        "model.encoder.version",
        "model.decoder.embed_positions._float_tensor",
        "model.encoder.layers.0.self_attn.masked_bias",
    ],
)
def test_a_constant_of_an_older_version_is_left_out(marian: Path, rewrite: Rewrite, constant: str) -> None:
    folder = rewrite(marian, lambda w: {**w, constant: torch.ones(1)})
    assert equal(load_model(str(folder), "translation"), load_model(str(marian), "translation"))


@pytest.mark.parametrize(("layers", "named"), [(1, "without a place in the model"), (3, "missing from")])
def test_a_config_with_another_number_of_layers_is_refused(
    marian: Path, rewrite: Rewrite, layers: int, named: str
) -> None:
    folder = rewrite(marian, dict)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layers": layers}))
    message = refusal(folder, "translation")
    assert f"{named}: model.decoder.layers.{min(layers, 2)}.*" in message or f"{named} " in message
    assert "another number of layers" in message


def test_a_translator_saved_by_automodel_is_refused(marian: Path, rewrite: Rewrite) -> None:
    """AutoModel drops the bias of the logits and the head."""
    inside = "model."
    folder = rewrite(marian, lambda w: {k.removeprefix(inside): v for k, v in w.items() if k.startswith(inside)})
    message = refusal(folder, "translation")
    assert "final_logits_bias" in message
    assert "lm_head.weight" in message


def test_a_base_model_of_bart_has_zeros_for_its_bias(marian: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, BartConfig, BartModel

    from deploykit.training.weights import load_reported

    config = BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, pad_token_id=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    BartModel(config).save_pretrained(tmp_path)
    model = load_reported("AutoModelForSeq2SeqLM", str(tmp_path), AutoConfig.from_pretrained(tmp_path)).model
    assert not model.final_logits_bias.any()


def test_a_bare_encoder_has_no_head_and_is_refused_but_may_be_trained(bert: Path, rewrite: Rewrite) -> None:
    def encoder(tensors: Tensors) -> Tensors:
        return {k.removeprefix("bert."): v for k, v in tensors.items() if k.startswith("bert.")}

    folder = rewrite(bert, encoder)
    message = refusal(folder, "classification")
    assert "missing from model.safetensors: classifier.bias, classifier.weight" in message
    assert "no trained head" in message
    assert load_for_training(str(folder)).new == ("classifier.bias", "classifier.weight")


def test_training_may_create_a_head_but_no_layer(bert: Path, rewrite: Rewrite) -> None:
    assert load_for_training(str(bert), num_labels=5).new == ("classifier.bias", "classifier.weight")
    assert load_for_training(str(bert)).new == ()
    folder = rewrite(bert, lambda w: {k: v for k, v in w.items() if ".layer.1." not in k and "pooler" not in k})
    with pytest.raises(ArtifactError, match=r"missing from model\.safetensors: bert\.encoder\.layer\.1\.\*"):
        load_for_training(str(folder))


def test_keys_with_a_foreign_prefix_are_refused_and_the_prefix_named(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, lambda w: {f"student.{key}": value for key, value in w.items()})
    message = refusal(folder, "classification")
    assert "Keys begin with 'student.'" in message
    assert "student.bert.embeddings" in message


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_torch_compile_and_ddp_are_removed(
    bert: Path, rewrite: Rewrite, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rewrite(bert, lambda w: {prefix + key: value for key, value in w.items()})
    assert equal(load_model(str(folder)), load_model(str(bert)))
    assert "took the prefix" in caplog.text


def test_weights_without_effect_are_ignored_and_named(
    bert: Path, rewrite: Rewrite, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rewrite(bert, lambda w: {**w, "cls.predictions.bias": w["classifier.bias"]})
    assert equal(load_model(str(folder)), load_model(str(bert)))
    assert "cls.predictions.bias" in caplog.text


def test_a_head_of_another_size_than_the_config_says_is_refused(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, lambda w: {**w, "classifier.bias": w["classifier.bias"][:1]})
    message = refusal(folder, "classification")
    assert "classifier.bias (1,) for (2,)" in message
    assert "names 2 labels, and the head has another number" in message


def test_a_head_without_one_of_its_tensors_is_not_made_anew(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, lambda w: {key: value for key, value in w.items() if key != "classifier.bias"})
    with pytest.raises(ArtifactError, match=r"missing from model.safetensors: classifier.bias"):
        load_for_training(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_key(bert: Path, rewrite: Rewrite, value: float) -> None:
    key = "bert.embeddings.word_embeddings.weight"
    folder = rewrite(bert, lambda w: {**w, key: torch.cat([torch.full((1, 32), value), w[key][1:]])})
    assert f"not finite numbers (NaN or infinite): {key}" in refusal(folder, "classification")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_type_become_fp32(bert: Path, rewrite: Rewrite, dtype: torch.dtype) -> None:
    folder = rewrite(bert, lambda w: {key: value.to(dtype) for key, value in w.items()})
    loaded, exact = load_model(str(folder)).state_dict(), load_model(str(bert)).state_dict()
    assert all(torch.equal(loaded[key], exact[key].to(dtype).float()) for key in exact)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(bert: Path, rewrite: Rewrite, name: str) -> None:
    folder = rewrite(bert, dict)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{name}: is a Git LFS pointer" in refusal(folder, "classification")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label in its config.json does not name each output once"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label in its config.json does not name each output once"),
        ({"id2label": {"0": " ", "1": "a"}}, "id2label in its config.json does not name each output once"),
        ({"id2label": {"0": "a ", "1": "a"}}, "id2label in its config.json does not name each output once"),
        (
            {"id2label": {"0": "a|b", "1": "a"}, "problem_type": "multi_label_classification"},
            "has the label 'a|b', and '|' separates labels",
        ),
        ({"problem_type": "token_classification"}, "problem_type 'token_classification' in its config.json is unknown"),
    ],
)
def test_a_config_that_does_not_say_what_the_head_answers_is_refused(
    bert: Path, rewrite: Rewrite, fields: dict[str, Any], message: str
) -> None:
    folder = rewrite(bert, dict)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ArtifactError, match=re.escape(message)):
        TorchClassifier.load(folder)


def test_labels_of_a_config_are_normalized_as_those_of_rows_are(bert: Path, rewrite: Rewrite) -> None:
    """Otherwise no row could have the label."""
    folder = rewrite(bert, dict)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "bad ", "1": "caf\u0065\u0301"}}))
    assert TorchClassifier.load(folder).task.labels == ("bad", "caf\u00e9")


def test_an_unknown_model_type_is_refused_by_every_task(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, dict)
    (folder / "config.json").write_text('{"model_type": "llama99"}')
    with pytest.raises(ArtifactError, match="has model type `llama99`"):
        load_config(str(folder))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bin_is_read_as_tensors_with_head_and_bias(
    marian: Path, rewrite: Rewrite, zipped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rewrite(marian, dict)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    caplog.set_level(logging.WARNING)
    loaded = load_model(str(folder), "translation")
    assert equal(loaded, load_model(str(marian), "translation"))
    assert torch.equal(loaded.final_logits_bias, tensors["final_logits_bias"])
    assert not torch.equal(loaded.lm_head.weight, loaded.model.shared.weight)
    assert "pytorch_model.bin is read with torch.load(weights_only=True)" in caplog.text


class _Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_bin_that_runs_code_is_refused_and_does_not_run(bert: Path, rewrite: Rewrite, tmp_path: Path) -> None:
    folder = rewrite(bert, dict)
    (folder / "model.safetensors").unlink()
    for dump in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        dump({"classifier.bias": _Command(tmp_path / "ran")}, folder / "pytorch_model.bin")
        assert "can run code" in refusal(folder, "classification")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {}, "epoch": 3}, folder / "pytorch_model.bin")
    assert "holds dict, int" in refusal(folder, "classification")


def test_a_shard_that_is_missing_is_named(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, dict)
    tensors = load_file(folder / "model.safetensors")
    names = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        torch.save({key: tensors[key] for key in names if names[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").unlink()
    assert equal(load_model(str(folder)), load_model(str(bert)))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin: no such file" in refusal(folder, "classification")


def test_weights_of_another_framework_are_named(bert: Path, rewrite: Rewrite) -> None:
    folder = rewrite(bert, dict)
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    with pytest.raises(ArtifactError, match=r"only tf_model\.h5"):
        check_source(str(folder))


def test_a_hub_id_is_read_from_the_cache(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    cached = tmp_path / "models--org--name"
    shutil.copytree(bert, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_folder("org/name") == cached / "snapshots" / "abc"


@pytest.fixture
def adapter(bert: Path, rewrite: Rewrite, tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA adapter saved by finetune, of a base without pooler and head, and the trained model."""
    base = rewrite(bert, lambda w: {k: v for k, v in w.items() if not k.startswith(("classifier", "bert.pooler"))})
    options = make_options({"model": str(base), "train": "x", "lora_r": 2})
    loaded = load_for_training(str(base), num_labels=2)
    assert len(loaded.new) == 4
    trained = with_adapter(loaded.model, options, "SEQ_CLS", loaded.new)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    folder = tmp_path / "adapter"
    trained.save_pretrained(folder)
    shutil.copy(bert / "tokenizer.json", folder)
    task = Classification(("bad", "good"), max_length=30, pad_token_id=0)
    write_manifest(folder, "checkpoint", task, inputs="adapter")
    return folder, trained


def test_an_adapter_has_all_new_weights(adapter: tuple[Path, Any]) -> None:
    folder, trained = adapter
    assert equal(load_model(str(folder)), trained.merge_and_unload())


def test_an_adapter_that_peft_saved_elsewhere_is_refused_with_what_to_do(adapter: tuple[Path, Any]) -> None:
    folder, _ = adapter
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is an adapter of") as refused:
        check_source(str(folder))
    assert "merge_and_unload" in refused.value.remedy


def test_an_adapter_without_the_new_pooler_is_refused(adapter: tuple[Path, Any]) -> None:
    folder, _ = adapter
    file = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "pooler" not in key}, file)
    (folder / "manifest.json").unlink()
    write_manifest(
        folder, "checkpoint", Classification(("bad", "good"), max_length=30, pad_token_id=0), inputs="adapter"
    )
    message = refusal(folder, "classification")
    assert "bert.pooler.dense.bias, bert.pooler.dense.weight" in message
    assert "modules_to_save" in message
