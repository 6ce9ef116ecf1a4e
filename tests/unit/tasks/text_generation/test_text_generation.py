"""Language models: the exported graph, generation, packing, metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from language_models import FAMILIES, random_model, tokenizer, write_checkpoint
from transformers import AutoTokenizer

from deploykit.errors import ArtifactError, DataError, ExportError, UsageError
from deploykit.graphs.causal_architecture import check_supported, read_causal_architecture
from deploykit.graphs.causal_decoder import build_causal_decoder
from deploykit.graphs.causal_lm import BLOCK, build_causal_lm, parts_of, quantize_blocks
from deploykit.quantization.onnx_files import save_with_weights
from deploykit.runtime.engines.causal_lm import OnnxCausalLm
from deploykit.runtime.sampling import Sampling, override
from deploykit.tasks.text_generation import packed_attention
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, checkpoint_facts, load_base_config
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.metrics import answer_metrics, extracted, parses, scored_metrics, token_f1
from deploykit.tasks.text_generation.packing import (
    IGNORED,
    TokenBatches,
    pack,
    pack_sharing,
    pad,
    row_tokens,
    shared_beginning,
)
from deploykit.tasks.text_generation.sft import supervised_loss
from deploykit.training.source import check_source

RANDOM = np.random.default_rng(0)


@cache
def prompts() -> list[list[int]]:
    lengths = (3, 31, 32, 33, 5, 40, 64, 7, 12, 90)
    return [np.random.default_rng(n).integers(6, 390, n).tolist() for n in lengths]


def rows(*lengths: int) -> list[EncodedRow]:
    return [EncodedRow(RANDOM.integers(6, 390, n), RANDOM.random(n) < 0.5) for n in lengths]


def reference(name: str = "llama") -> TorchGenerator:
    model, own = random_model(name), tokenizer(CHATML)
    return TorchGenerator(model, own, checkpoint_facts(model.config, model.generation_config, own))


def exported(generator: TorchGenerator, folder: Path, bits: Any = None) -> LocalGenerator:
    path = folder / f"decoder{bits}.onnx"
    save_with_weights(build_causal_decoder(read_causal_architecture(generator.torch_model), bits), path)
    return LocalGenerator(generator.task, generator.tokenizer, OnnxCausalLm(path, 2, context=256))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_gives_pytorchs_logits_and_tokens(name: str, tmp_path: Path) -> None:
    theirs = reference(name)
    ours = exported(theirs, tmp_path)
    some = rows(40, 17)
    for expected, found in zip(theirs.supervised_logits(some), ours.supervised_logits(some)):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    sampling = Sampling(max_new_tokens=12)
    answers = ours.generate(prompts()[:4], sampling)
    for prompt, [answer] in zip(prompts(), answers):
        generated = theirs.torch_model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=12, eos_token_id=list(theirs.task.eos_token_ids), pad_token_id=5,
        )  # fmt: skip
        assert list(answer.ids) == generated[0, len(prompt) :].tolist()


def test_a_checkpoints_repetition_penalty_is_the_default_and_other_rules_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    file = folder / "generation_config.json"
    written = {**json.loads(file.read_text()), "do_sample": True, "temperature": 0.7, "max_new_tokens": 9}
    file.write_text(json.dumps({**written, "repetition_penalty": 1.9}))
    generator = TorchGenerator.load(folder)
    prompt = torch.tensor([prompts()[0]])
    theirs = generator.torch_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24
    )
    [[ours]] = generator.generate([prompts()[0]], override(generator.task.sampling, {"max_new_tokens": 24}))
    assert list(ours.ids) == theirs[0, prompt.shape[1] :].tolist()
    plain = override(generator.task.sampling, {"max_new_tokens": 24, "repetition_penalty": 1.0})
    assert generator.generate([prompts()[0]], plain)[0][0].ids != ours.ids
    file.write_text(json.dumps({**written, "no_repeat_ngram_size": 3, "suppress_tokens": [7]}))
    with pytest.raises(ArtifactError, match=f"{folder}: its generation config sets no_repeat_ngram_size, suppress_tok"):
        TorchGenerator.load(folder)


def test_a_tokenizer_that_splits_special_tokens_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "split_special_tokens": True}))
    with pytest.raises(ArtifactError, match="split_special_tokens"):
        TorchGenerator.load(folder)


def test_the_graph_has_optimums_names(tmp_path: Path) -> None:
    model = build_causal_lm(read_causal_architecture(random_model("llama")))
    caches = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [i.name for i in model.graph.input] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in caches)
    ]  # fmt: skip
    assert [o.name for o in model.graph.output] == ["logits", *(f"present.{name}" for name in caches)]
    for _ in range(2):  # the second replaces the first
        save_with_weights(build_causal_lm(read_causal_architecture(random_model("llama"))), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 100_000 < (tmp_path / "model.onnx_data").stat().st_size < 700_000


def test_other_architectures_and_rope_scalings_are_refused_by_name() -> None:
    from transformers import BloomConfig, LlamaConfig

    with pytest.raises(ExportError, match="'bloom' are not supported"):
        check_supported(BloomConfig(), "b")
    scaled = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ExportError, match="RoPE scaling 'dynamic'"):
        check_supported(scaled, "b")


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=10), Sampling(max_new_tokens=10, temperature=1.5, seed=3)]
)
def test_an_answer_is_the_same_in_any_company(bits: Any, sampling: Sampling, tmp_path: Path) -> None:
    generator = exported(reference(), tmp_path, bits)
    together = generator.generate(prompts() * 3, sampling)
    alone = [generator.generate([prompt], sampling)[0] for prompt in prompts()]
    assert together == alone * 3, "ids and log-probabilities, to the last bit"


def test_several_answers_stop_texts_and_limits(tmp_path: Path) -> None:
    generator = exported(reference(), tmp_path)
    [found] = generator.generate(prompts()[:1], Sampling(max_new_tokens=8, temperature=2.0, n=3))
    assert len({answer.ids for answer in found}) == 3
    assert found[0] == generator.generate(prompts()[:1], Sampling(max_new_tokens=8, temperature=2.0))[0][0]
    [[plain]] = generator.generate(prompts()[1:2], Sampling(max_new_tokens=8))
    assert (plain.finish, plain.tokens, plain.prompt_tokens) == ("length", 8, 31)
    word = plain.text[3:5]
    [[stopped]] = generator.generate(prompts()[1:2], Sampling(max_new_tokens=8, stop=(word,)))
    assert stopped.finish == "stop"
    assert stopped.text == plain.text[: plain.text.index(word)]
    [[full]] = generator.generate([[7] * 250], Sampling(max_new_tokens=50))
    assert full.prompt_tokens + full.tokens == 256
    with pytest.raises(DataError, match="256 tokens, and the model's context holds 256"):
        generator.generate([[7] * 256])
    with pytest.raises(DataError, match="empty"):
        generator.generate([[]])


def test_what_ends_an_answer(tmp_path: Path) -> None:
    generator = exported(reference(), tmp_path)

    def answer(**given: Any) -> Any:
        return generator.generate(prompts()[1:2], Sampling(max_new_tokens=8, **given))[0][0]

    plain = answer()
    second = plain.ids[1]
    assert second != plain.ids[0]
    stopped = answer(stop_token_ids=(second,))
    assert (stopped.ids, stopped.finish) == (plain.ids[:2], "eos")
    assert second not in answer(stop_token_ids=(second,), min_new_tokens=8).ids
    forced = answer(logit_bias=((2, 100.0),))
    assert (forced.ids, forced.finish, forced.text) == ((2,), "eos", "")
    assert answer(logit_bias=((2, 100.0),), ignore_eos=True).ids == (2,) * 8
    word = plain.text[:2]
    assert answer(stop=(word,)).text == ""
    assert answer(stop=(word,), min_new_tokens=8).text == plain.text
    with pytest.raises(UsageError, match="stop_token_ids names token 400"):
        answer(stop_token_ids=(400,))


def test_best_of_keeps_the_likeliest_per_token(tmp_path: Path) -> None:
    generator = exported(reference(), tmp_path)
    sampling = Sampling(max_new_tokens=6, temperature=1.5, n=5, logprobs=0)
    [found] = generator.generate(prompts()[:1], sampling)
    [best] = generator.generate(prompts()[:1], replace(sampling, n=2, best_of=5))
    assert best == sorted(found, key=lambda answer: -np.mean([found["logprob"] for found in answer.logprobs]))[:2]
    [[answer]] = generator.generate(prompts()[:1], replace(sampling, n=1, logprobs=3, temperature=0.0))
    for token, found in zip(answer.ids, answer.logprobs):
        assert found["token_id"] == found["top"][0]["token_id"] == token
        assert (
            found["logprob"] == found["top"][0]["logprob"] >= found["top"][1]["logprob"] >= found["top"][2]["logprob"]
        )


def test_int8_and_int4_blocks_are_what_onnx_runtime_multiplies_by(tmp_path: Path) -> None:
    weight = RANDOM.normal(0, 1, (6, 70)).astype(np.float32)
    for bits, step in ((8, 127), (4, 7.5)):
        values, scales, zeros = quantize_blocks(weight, bits)
        assert values.shape == (6, 3, BLOCK * bits // 8)
        if bits == 4:
            assert zeros is not None
            values = np.stack([values & 15, values >> 4], -1).reshape(6, 3, BLOCK)
            unpacked = np.stack([zeros & 15, zeros >> 4], -1).reshape(6, -1)[:, :3, None].astype(float)
        else:
            unpacked = np.array(128.0)
        restored = ((values.astype(float) - unpacked) * scales[:, :, None]).reshape(6, -1)[:, :70]
        assert np.abs(restored - weight).max() <= np.abs(weight).max() / step * 0.51
    model = random_model("llama")
    architecture = read_causal_architecture(model)
    quantized = build_causal_lm(architecture, 8, kept={"layers.0.attention", "head"})
    assert parts_of(architecture)[:3] == ["embedding", "layers.0.attention", "layers.0.feed_forward"]
    assert sum(node.op_type == "MatMulNBits" for node in quantized.graph.node) == 10
    onnx.checker.check_model(quantized)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_neox"])
def test_packed_rows_do_not_see_each_other(name: str) -> None:
    model = random_model(name).eval()
    some = rows(20, 3, 33, 12)
    packed_attention.register()
    for implementation in ("eager", "sdpa", packed_attention.NAME):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            alone = [supervised_loss(model, pack([row])) for row in some]
            packed, count = supervised_loss(model, pack(some))
            padded, again = supervised_loss(model, pad(some, pad_token_id=int(some[0].ids[0])))
        assert count == again == sum(n for _, n in alone)
        expected = float(sum(loss for loss, _ in alone))
        assert float(packed) == pytest.approx(expected, rel=1e-5)
        assert float(padded) == pytest.approx(expected, rel=1e-5), "what is padding goes by position, not by its id"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_attention_row_by_row_has_the_gradients_of_all_pairs(name: str) -> None:
    model = random_model(name, sliding_window=6) if name != "llama" else random_model(name)
    packed_attention.register()
    batch = pack(rows(20, 3, 33, 12))
    found = []
    for implementation in ("eager", packed_attention.NAME):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        supervised_loss(model, batch)[0].backward()
        found.append({key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None})
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-3, atol=1e-5, msg=key)


def rows_that_begin_alike(supervised_from: int = 12) -> list[EncodedRow]:
    beginning = RANDOM.integers(6, 390, 9)
    found = []
    for n in (20, 6, 33, 7):
        ids = np.append(beginning, RANDOM.integers(6, 390, n))
        found.append(EncodedRow(ids, np.arange(len(ids)) >= supervised_from))
    return found


@pytest.mark.parametrize(
    ("name", "supervised_from"),
    # Gemma 2 trains with eager attention, and shares nothing.
    [("llama", 5), *((name, 12) for name in FAMILIES if name != "gemma2")],
)
def test_a_shared_beginning_changes_neither_loss_nor_gradients(name: str, supervised_from: int) -> None:
    window = {} if "sliding_window" not in FAMILIES[name] else {"sliding_window": 64}
    model = random_model(name, **window)
    packed_attention.register()
    some = rows_that_begin_alike(supervised_from)
    plain, sharing = pack(some), pack_sharing(some)
    shared = min(9, supervised_from - 1)
    assert sharing["input_ids"].shape[1] == plain["input_ids"].shape[1] - 3 * shared
    assert row_tokens(sharing) == row_tokens(plain) == row_tokens(pad(some, 5)) == 102
    found = []
    for implementation, batch in (("eager", plain), ("sdpa", sharing), (packed_attention.NAME, sharing)):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        loss, count = supervised_loss(model, batch)
        assert count == sum(int(row.supervised.sum()) for row in some)
        loss.backward()
        grads = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        found.append((float(loss.detach()), grads))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for key, expected in found[0][1].items():
            torch.testing.assert_close(grads[key], expected, rtol=1e-3, atol=1e-4, msg=key)


def test_rows_share_nothing_that_is_supervised_or_differs() -> None:
    some = rows_that_begin_alike()
    assert shared_beginning(some) == 9
    assert shared_beginning(some[:1]) == 0
    assert shared_beginning([*some, EncodedRow(some[0].ids, np.ones(len(some[0].ids), bool))]) == 0
    assert shared_beginning([some[0], EncodedRow(some[0].ids[1:], some[0].supervised[1:])]) == 0
    assert shared_beginning([some[0], some[0]]) == 11
    assert pack_sharing(rows(20, 9)).keys() == pack(rows(20, 9)).keys()


def test_the_loss_is_that_of_all_logits() -> None:
    model = random_model("llama")
    batch = pad(rows(20, 9), 5)
    total, count = supervised_loss(model, batch)
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert float(total.detach()) / count == pytest.approx(float(plain.detach()), rel=1e-5)
    assert int((batch["labels"] != IGNORED).sum()) == count


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_every_row_once_and_no_more_tokens_than_asked(packed: bool) -> None:
    lengths = RANDOM.integers(1, 60, 200).tolist()
    batches = TokenBatches([*lengths, 500], 128, packed=packed, seed=0)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert sorted(row for batch in epochs[-1] for row in batch) == list(range(201))
        assert len(epochs[-1]) == len(batches)
    assert epochs[0] != epochs[1]
    sizes = [[[*lengths, 500][row] for row in batch] for batch in epochs[0]]
    assert all((sum(s) if packed else len(s) * max(s)) <= 128 or len(s) == 1 for s in sizes)
    if packed:
        assert sum(map(sum, sizes)) > 0.95 * 128 * (len(sizes) - 1)


def test_a_gguf_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ArtifactError, match="is not a GGUF file"):
        check_source(str(path), "text-generation")
    path.write_bytes(b"GGUF" + bytes(20))
    check_source(str(path), "text-generation")
    with pytest.raises(ArtifactError, match="holds a language model"):
        check_source(str(path), "classification")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_base_config(str(path))


def test_a_long_prompt_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = exported(reference(), tmp_path)
    some, sampling = rows(100, 70), Sampling(max_new_tokens=5)
    scores, answers = list(ours.supervised_logits(some)), ours.generate(prompts()[-1:], sampling)
    monkeypatch.setattr("deploykit.tasks.text_generation.generator._CHUNK", 24)
    assert [a.ids for a in ours.generate(prompts()[-1:], sampling)[0]] == [a.ids for a in answers[0]]
    for expected, found in zip(scores, ours.supervised_logits(some)):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_metrics_of_answers() -> None:
    answers = ["ls -l", "rm x", "The answer is #### 1,234"]
    found = answer_metrics(answers, ["ls -l", "cat x", "So #### 1234"], answer_regex=r"#### (.+)", syntax="bash")
    assert found["exact_match"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["first_word"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["extracted_match"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["parses"] == 1.0
    assert 0 < found["rouge_l"] < 1
    assert all(0 <= low <= found[name] <= high for name, (low, high) in found["intervals"].items())
    assert token_f1("The cat, sat.", "a cat sat") == 1.0
    assert token_f1("cat", "dog") == 0.0
    import re

    assert extracted(re.compile(r"\d+"), "1 then 2") == "2"


def test_syntax_is_checked_and_nothing_is_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    assert parses(f"touch {victim}", "bash")
    assert not victim.exists()
    assert not parses("if then (", "bash")
    assert parses("print('a')", "python")
    assert not parses("print('a'", "python")
    assert parses('{"a": 1}', "json")
    assert not parses("{a: 1}", "json")
    assert not parses(" ", "json")
    assert parses("SELECT a, count(*) FROM t WHERE b > 1 GROUP BY a; DROP TABLE t", "sql")
    assert not parses("SELECT FROM WHERE", "sql")
    assert not parses("hello world", "sql")


def test_metrics_of_scores_are_those_of_pytorchs_loss() -> None:
    generator = reference()
    some = [EncodedRow(row.ids, np.arange(len(row.ids)) > 5) for row in rows(20, 30)]
    found = scored_metrics(list(generator.score(some)), ["abcd", "efgh"])
    with torch.inference_mode():
        losses = [supervised_loss(generator.torch_model, pack([row])) for row in some]
    expected = float(sum(loss for loss, _ in losses)) / sum(n for _, n in losses)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected * found["tokens"] / np.log(2) / 8, rel=1e-5)


def test_a_field_of_another_family_changes_nothing() -> None:
    """Gemma 3's config has a cap of attention that its model does not read; the first Gemma's may name two activations."""
    capped = read_causal_architecture(random_model("gemma3_text", attn_logit_softcapping=5.0))
    assert capped.attention_cap is None
    model = random_model("gemma", hidden_activation="silu", hidden_act="relu")
    assert {layer.feed_forward.activation for layer in read_causal_architecture(model).layers} == {"relu"}


def test_a_window_of_unknown_size_is_refused() -> None:
    config = random_model("qwen3").config
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], None
    with pytest.raises(ExportError, match="there is no sliding_window"):
        check_supported(config, "model")


def test_a_gemma_that_reads_in_both_directions_is_refused() -> None:
    config = random_model("gemma3_text").config
    config.use_bidirectional_attention = True
    with pytest.raises(ExportError, match="each token reads the tokens after it"):
        check_supported(config, "model")


DEFAULT = "\n {%- if true %} D {% endif %}\n{{ messages[0].content }}  \n"
TOOL_USE = "\n  {% for tool in tools %}{{ tool.function.name }}{% endfor %} {{ messages[0].content }}\n"
WINDOWS = "{{ messages[0].content }}\r\n"


@pytest.mark.parametrize(("default", "tool_use"), [(DEFAULT, TOOL_USE), ("  {% if true %}D{% endif %}", WINDOWS)])
def test_named_templates_write_what_transformers_writes(default: str, tool_use: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    name_templates(folder, default=default, tool_use=tool_use, rag="R")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    messages = [{"role": "user", "content": "list the file"}]
    chat, theirs = TorchGenerator.load(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    for tools in (None, [tool]):
        expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert chat.encode_prompt(messages, tools) == expected
    name_templates(folder, rag="R")
    with pytest.raises(ArtifactError, match="the chat templates rag, and none is named default"):
        TorchGenerator.load(folder)


def name_templates(folder: Path, **templates: str) -> None:
    path = folder / "tokenizer_config.json"
    named = [{"name": name, "template": template} for name, template in templates.items()]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
