"""A tiny language model from rows to answers, as a user types it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from killed_run import kill_at_step, signal_at_step
from language_models import command_rows, random_model, tokenizer, write_checkpoint, write_rows

from deploykit.artifacts import load_manifest
from deploykit.runtime.engines.native.causal_weights import CausalWeights
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation import generate
from deploykit.tasks.text_generation.chat_template import CHATML, ChatTemplate
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, checkpoint_facts
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.page import write_run_page
from deploykit.tasks.text_generation.sft import train

Deploykit = Callable[..., tuple[int, str, str]]
QUICK = ("--task", "text-generation", "--eval-rows", 4, "--mixed-precision", "no", "--batch-tokens", 512)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "commands.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and ChatML, as it comes from transformers."""
    return write_checkpoint(tmp_path_factory.mktemp("base"), template=CHATML, scale=1.0)


@pytest.fixture(scope="module")
def run(deploykit: Deploykit, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned the commands."""
    out = tmp_path_factory.mktemp("runs") / "run"
    code, _, err = deploykit("finetune", *QUICK, base, "--train", rows, "--output-dir", out, "--max-steps", 150,
                             "--eval-steps", 75, "--learning-rate", 1e-2, "--show-rows", 1)  # fmt: skip
    assert code == 0, err
    assert "format: prompts in 'prompt', answers in 'completion'" in err
    assert "⟦" in err.split("a row as the model reads it")[1], "supervised tokens are shown"
    assert "tokens/s" in err
    assert " -> " in err.split("step 0 of 150: on the validation rows")[1].split("step ")[0], "the first answers"
    return out


@pytest.fixture(scope="module")
def export(deploykit: Deploykit, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "lm"
    code, _, err = deploykit("export", run, "--output-dir", out, "--int8", "--int4", "--gguf", "f16", "--max-drop", 100)
    assert code == 0, err
    assert "parity with PyTorch" in err
    return out


def test_an_export_with_int8_caches_is_measured_and_answers(deploykit: Deploykit, run: Path, tmp_path: Path) -> None:
    for cache in ("fp32", "int8"):
        out = tmp_path / cache
        code, told, err = deploykit(
            "export", run, "--output-dir", out, "--int8", "--kv-cache-dtype", cache, "--max-drop", 100, "--json"
        )
        assert code == 0, err
        assert CausalWeights(out / "native.int8.safetensors").cache == cache
        assert json.loads(told)["quantization"]["native"]["int8"]["perplexity_ratio"] == pytest.approx(1, abs=0.05)
    code, told, err = deploykit("generate", out, "--prompt", "list files", "--max-new-tokens", 4)
    assert code == 0, err
    code, _, err = deploykit("export", run, "--output-dir", tmp_path / "x", "--kv-cache-dtype", "int8")
    assert (code, "add --int8 or --int4" in err) == (2, True)


def test_a_run_learns_to_answer_and_to_stop(run: Path) -> None:
    metrics = load_manifest(run, "checkpoint").metrics
    before, after = metrics["before"]["test"], metrics["test"]
    assert after["perplexity"] < 0.2 * before["perplexity"]
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]), rel=1e-4)
    found = metrics["differences"]["before"]
    for name in ("perplexity", "exact_match"):
        assert found[name]["difference"] == pytest.approx(after[name] - before[name], abs=1e-4)
        assert found[name]["beyond_noise"], name
    assert "Against before (paired bootstrap, 95 %): beyond noise: " in (run / "README.md").read_text(encoding="utf-8")
    generator = TorchGenerator.load(run)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in command_rows()[:24]]
    answers = generator.generate([generator.tokenizer.encode_prompt(p) for p in prompts], Sampling(max_new_tokens=20))
    assert {answer.finish for [answer] in answers} == {"eos"}
    right = [answer.text == row["completion"] for [answer], row in zip(answers, command_rows())]
    assert np.mean(right) > 0.8


def test_a_run_has_a_page_with_its_losses_and_answers(run: Path) -> None:
    metrics = load_manifest(run, "checkpoint").metrics
    evaluations = metrics["history"]["evaluations"]
    assert [e["step"] for e in evaluations] == [0, 75, 150]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert sum(metrics["lengths"]["counts"]) == metrics["rows"]["train"]
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in [q["prompt"] for q in metrics["questions"]] + [escape(a) for e in evaluations for a in e["answers"]]:
        assert text in page
    assert page.count("<svg") == 2


def test_transformers_opens_the_checkpoint_and_answers_the_same(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, own = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert own.chat_template == CHATML == (run / "chat_template.jinja").read_text(encoding="utf-8")
    prompt = command_rows()[5]["prompt"]
    ids = own.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    generator = TorchGenerator.load(run)
    [[answer]] = generator.generate([ids[0].tolist()], Sampling(max_new_tokens=20))
    assert list(answer.ids) == generated[0, ids.shape[1] :].tolist()
    assert answer.finish == "eos"


def test_every_form_of_the_model_is_measured_alike(deploykit: Deploykit, run: Path, export: Path) -> None:
    data = run / "splits" / "test.jsonl"
    found = {}
    native = "native" if lacks() is None else "onnxruntime"
    forms = ((run, "auto", ()), (export, "fp32", ()), (export, "int8", ("--engine", "onnxruntime")),
             (export, "int4", ("--engine", "onnxruntime")), (export, "int8", ("--engine", native)),
             (export, "int4", ("--engine", native)))  # fmt: skip
    for target, precision, engine in forms:
        code, out, err = deploykit("evaluate", target, "--data", data, "--precision", precision, *engine, "--json",
                                   "--max-new-tokens", 20, "--syntax", "bash", "--answer-regex", r"^\w+")  # fmt: skip
        assert code == 0, err
        found[target, precision, engine] = json.loads(out)["metrics"]
    plain, fp32, int8, int4, *natives = found.values()
    assert fp32["loss"] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-5)
    assert fp32["exact_match"] == plain["exact_match"]
    assert int8["loss"] == pytest.approx(plain["loss"], abs=0.05)
    assert int4["loss"] == pytest.approx(plain["loss"], abs=1)
    assert int4["loss"] != int8["loss"]
    for metrics, tolerance in zip(natives, (0.05, 1)):
        assert metrics["loss"] == pytest.approx(plain["loss"], abs=tolerance)
    assert plain["parses"] == 1.0
    assert set(plain["intervals"]) == {
        "loss", "perplexity", "bits_per_byte", "token_accuracy", "exact_match", "token_f1", "first_word", "rouge_l",
        "chrf", "extracted_match", "parses",
    }  # fmt: skip
    manifest = load_manifest(export, "export").metrics
    assert manifest["parity"]["tokens"] == manifest["parity"]["equal"] > 0
    assert manifest["quantization"]["int8"]["perplexity_ratio"] < 1.05
    assert 0 <= manifest["quantization"]["int8"]["kl_mean"] < manifest["quantization"]["int4"]["kl_mean"]
    if lacks() is None:
        own = manifest["quantization"]["native"]
        assert own["int8"]["perplexity_ratio"] < 1.05
        assert 0 <= own["int8"]["kl_mean"] < own["int4"]["kl_mean"]


def test_generate_answers_prompts_and_files(deploykit: Deploykit, export: Path, rows: Path, tmp_path: Path) -> None:
    prompt, *others = (row["prompt"] for row in command_rows())
    code, out, err = deploykit("generate", export, prompt, "x " * 300, "--max-new-tokens", 20,
                               "--logprobs", 2, "--json")  # fmt: skip
    assert (code, "text 2: the prompt has" in err) == (1, True), err
    answered, refused = json.loads(out)["results"]
    assert len(answered["logprobs"]) == len(answered["top_logprobs"]) == answered["tokens"]
    best, second = answered["top_logprobs"][0]
    assert best["logprob"] == answered["logprobs"][0] > second["logprob"]
    assert "tokens, and the model's context holds 256" in refused["error"]
    answers = tmp_path / "answers.jsonl"
    words = ("generate", export, "--input", rows, "--output", answers, "--temperature", 0.8, "--seed", 3, "--n", 2,
             "--max-new-tokens", 12)  # fmt: skip
    code, out, err = deploykit(*words)
    assert code == 0, err
    whole = answers.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [r["prompt"] for r in records] == [prompt, *others]
    assert all(len(r["answers"]) == 2 for r in records)
    again = tmp_path / "again.jsonl"
    code, _, err = deploykit(*words[:5], again, *words[6:])
    assert code == 0, err
    assert again.read_bytes() == whole, "the same seed gives the same answers"
    code, _, err = deploykit(*words)
    assert (code, "exists" in err) == (1, True)


def test_chat_remembers_the_dialog(export: Path, run: Path) -> None:
    def chat(text: str, *words: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "deploykit", "chat", *map(str, words)], input=text, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    prompt = command_rows()[0]["prompt"]
    generator = TorchGenerator.load(run)
    asked = [{"role": "user", "content": prompt}]
    sampling = Sampling(max_new_tokens=20)
    answers = []
    for _ in range(2):
        [[answer]] = generator.reply([asked], sampling)  # type: ignore[misc]
        answers.append(answer.text)
        asked = [*asked, {"role": "assistant", "content": answer.text}, {"role": "user", "content": prompt}]
    code, out, err = chat(f"{prompt}\n{prompt}\n/reset\n{prompt}\n/nonsense\n/exit\n", export, "--max-new-tokens", 20)
    assert code == 0, err
    assert out.splitlines() == [*answers, answers[0], ""]
    assert "/nonsense is not a command" in err
    code, _, err = chat(f"{'x ' * 300}\n", export)
    assert (code, "tokens, and the model's context holds 256" in err) == (0, True)
    code, _, err = chat("", export, "--temperature", -1)
    assert (code, "temperature is -1.0" in err) == (2, True)


def test_ctrl_c_stops_only_the_answer(export: Path) -> None:
    words = [sys.executable, "-u", "-m", "deploykit", "chat", str(export), "--max-new-tokens", "100000", "--ignore-eos"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"list the file here\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/exit\n")
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def test_generate_constrains_answers(deploykit: Deploykit, export: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, '
                      '"required": ["n"], "additionalProperties": false, "x-guidance": {"whitespace_pattern": " "}}')  # fmt: skip
    grammar = tmp_path / "answer.lark"
    grammar.write_text('start: "ls" | "rm"')
    for words, pattern in (
        (("--json-schema", schema), r'\{ ?"n" ?: ?[0-9] ?\}'),
        (("--json-schema", schema.read_text()), r'\{ ?"n" ?: ?[0-9] ?\}'),
        (("--regex", "[0-9]{3}"), r"[0-9]{3}"),
        (("--choice", "日本", "--choice", "😀"), "日本|😀"),
        (("--grammar", grammar), "ls|rm"),
    ):
        code, out, err = deploykit("generate", export, "list", "--temperature", 1, "--n", 3, "--best-of", 4,
                                   "--min-new-tokens", 1, "--json", *words)  # fmt: skip
        assert code == 0, err
        for answer in json.loads(out)["results"][0]["answers"]:
            assert re.fullmatch(pattern, answer["answer"]), answer
            assert answer["finish"] in ("stop", "eos")
    for words, told in (
        (("--json-schema", tmp_path / "none.json"), "cannot be read"),
        (("--json-schema", "{"), "is not JSON"),
        (("--json-schema", '{"type": "strin"}'), "Invalid type: strin"),
        (("--regex", "a", "--choice", "a"), "regex and choice exclude each other"),
        (("--logit-bias", "x=1"), "logit_bias names token 'x'"),
        (("--logit-bias", "1"), "is not a token id"),
        (("--logit-bias", "100000=1"), "logit_bias names token 100000"),
        (("--stop-token-ids", 100000), "stop_token_ids names token 100000"),
    ):
        code, _, err = deploykit("generate", export, "list", *words)
        assert (code, told in err) == (2, True), err


def test_predict_answers_texts_and_tables(deploykit: Deploykit, export: Path, tmp_path: Path) -> None:
    prompt = command_rows()[0]["prompt"]
    code, out, err = deploykit("generate", export, prompt, "--max-new-tokens", 20, "--json")
    assert code == 0, err
    expected = json.loads(out)["results"][0]["answer"]
    code, out, err = deploykit("predict", export, prompt, "--max-new-tokens", 20, "--json")
    assert code == 0, err
    [found] = json.loads(out)["results"]
    assert (found["text"], found["answer"], found["finish"]) == (prompt, expected, "eos")
    dialog = [{"role": "user", "content": prompt}]
    rows = [dialog, [{"role": "system", "content": "Be brief."}, *dialog]]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    code, _, err = deploykit("predict", export, "--input", table, "--output", answers, "--max-new-tokens", 20)
    assert (code, "rows.jsonl:2: the dialog has several messages" in err) == (1, True), err
    one, several = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
    assert one["answer"] == expected
    assert "use deploykit generate" in several["error"]


def test_an_export_answers_without_torch(export: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from click.testing import CliRunner\n"
        "from deploykit.cli import main\n"
        f"r = CliRunner().invoke(main, ['generate', {str(export)!r}, 'list the file here'])\n"
        "print(r.output); sys.exit(r.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_an_adapter_is_merged_and_a_template_is_kept(deploykit: Deploykit, rows: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = write_checkpoint(tmp_path / "gpt2", "gpt2", scale=1.0)
    code, _, err = deploykit("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "none")
    assert code == 2
    assert "no chat template" in err
    code, _, err = deploykit("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "run", "--max-steps",
                             6, "--lora-r", 4, "--chat-template", "alpaca", "--no-packing", "--learning-rate", 1e-2)  # fmt: skip
    assert code == 0, err
    assert "the adapter is merged into the weights" in err
    metrics = load_manifest(tmp_path / "run", "checkpoint").metrics
    assert metrics["test"]["loss"] < metrics["before"]["test"]["loss"]
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]), "still tied"
    assert torch.equal(
        weights["lm_head.weight"], AutoModelForCausalLM.from_pretrained(base).state_dict()["lm_head.weight"]
    )


def test_int8_with_calibrated_activations(deploykit: Deploykit, run: Path, rows: Path, tmp_path: Path) -> None:
    code, out, err = deploykit("calibrate", run, "--calibration-rows", 40, "--output-dir", tmp_path / "calibration")
    assert code == 0, err
    assert "layers.0.attention.query" in out + err
    ways = {"saved": ("--calib", tmp_path / "calibration", "--method", "mse"),
            "smoothed": ("--smooth-quant", "--calibration-data", rows)}  # fmt: skip
    for name, options in ways.items():
        code, _, err = deploykit("export", run, "--output-dir", tmp_path / name, "--int8", *options, "--max-drop", 10)
        assert code == 0, err
        quantization = load_manifest(tmp_path / name, "export").metrics["quantization"]
        assert quantization["calibration"]["rows"] == (40 if name == "saved" else 96)
        assert quantization["smooth_quant"] == (None if name == "saved" else 0.5)
        assert quantization["int8"]["perplexity_ratio"] < 1.1
        kinds = {
            node.op_type
            for node in onnx.load(tmp_path / name / "decoder.int8.onnx", load_external_data=False).graph.node
        }
        assert {"MatMulIntegerToFloat", "MatMulNBits"} <= kinds
        code, _, err = deploykit("evaluate", tmp_path / name, "--data", run / "splits" / "test.jsonl", "--engine", "onnxruntime",
                                 "--precision", "int8")  # fmt: skip
        assert code == 0, err


def test_dora_is_merged_as_well(deploykit: Deploykit, base: Path, rows: Path, tmp_path: Path) -> None:
    words = ("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "run", "--max-steps", 3,
             "--learning-rate", 1e-2, "--use-dora", "--use-rslora", "--neftune-noise-alpha", 5, "--gradient-checkpointing")  # fmt: skip
    code, _, err = deploykit(*words)
    assert code == 2
    assert "--use-dora is a kind of adapter" in err
    code, _, err = deploykit(*words, "--lora-r", 4)
    assert code == 0, err
    assert "the adapter is merged into the weights" in err
    metrics = load_manifest(tmp_path / "run", "checkpoint").metrics
    assert metrics["test"]["loss"] < metrics["before"]["test"]["loss"]


def test_tokens_that_a_template_adds_are_learned(deploykit: Deploykit, rows: Path, tmp_path: Path) -> None:
    own = tokenizer()
    folder = tmp_path / "plain"
    random_model("gpt2", scale=1.0).save_pretrained(folder)
    renamed = json.loads(own.backend_tokenizer.to_str().replace("<|im_", "<|other_"))
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(renamed)), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    words = ("finetune", *QUICK, folder, "--train", rows, "--chat-template", "chatml", "--max-steps", 2)
    code, _, err = deploykit(*words, "--output-dir", tmp_path / "lora", "--lora-r", 4)
    assert code == 2
    assert "embeddings a LoRA adapter does not train" in err
    code, _, err = deploykit(*words, "--output-dir", tmp_path / "run")
    assert code == 0, err
    facts = load_manifest(tmp_path / "run", "checkpoint").task
    assert facts.eos_token_ids[-1] == TorchGenerator.load(tmp_path / "run").tokenizer.tokenizer.token_to_id(
        "<|im_end|>"
    )


def test_what_cannot_be_done_is_refused_before_training(
    deploykit: Deploykit, base: Path, rows: Path, export: Path, tmp_path: Path
) -> None:
    from transformers import BloomConfig

    other = tmp_path / "bloom"
    shutil.copytree(base, other)
    BloomConfig(architectures=["BloomForCausalLM"]).save_pretrained(other)
    cases = [
        (("finetune", *QUICK, other, "--train", rows, "--output-dir", tmp_path / "x"), 1, "'bloom' are not supported"),
        (("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "x", "--max-length", 5000), 2,
         "takes at most 256 tokens"),
        (("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "x", "--lora-r", 2, "--lora-target-modules",
          "nothing"), 2, "--lora-target-modules nothing"),
        (("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "x", "--teacher", export), 2, "is an export"),
        (("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "x", "--distill-alpha", 0.1), 2,
         "--distill-alpha is for --teacher"),
        (("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "x", "--student-layers", 1, "--lora-r", 2), 2,
         "--student changes the checkpoint"),
        (("finetune", *QUICK, base, "--train", rows, "--output-dir", tmp_path / "x", "--student", "layers=2"), 2,
         "--student asks for 2 layers, and the model has 2"),
        (("calibrate", base, "--output-dir", tmp_path / "c"), 1, "--calibration-data"),
        (("export", base, "--output-dir", tmp_path / "e", "--data", rows, "--method", "minmax"), 2, "add --int8"),
        (("export", base, "--output-dir", tmp_path / "e", "--data", rows, "--int8", "--calibration-rows", 3), 1,
         "has no train rows"),
        (("export", export / "model.gguf", "--output-dir", tmp_path / "e"), 1, "no such model folder"),
        (("generate", export), 2, "give texts"),
        (("generate", export, "a", "--temperature", "-1"), 2, "temperature is -1.0"),
        (("translate", export, "a"), 2, "use deploykit predict"),
        (("evaluate", export, "--data", rows, "--label-column", "x"), 2, "--label-column does not apply"),
        (("evaluate", export, "--data", rows, "--answer-regex", "("), 2, "not a regular expression"),
    ]  # fmt: skip
    for words, code, told in cases:
        done = deploykit(*words)
        assert (done[0], told in done[2]) == (code, True), (words, done)


def test_a_killed_run_continues_to_the_same_end(deploykit: Deploykit, base: Path, rows: Path, tmp_path: Path) -> None:
    words = ("finetune", *QUICK, base, "--train", rows, "--max-steps", 6, "--eval-steps", 2)
    code, _, err = deploykit(*words, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    kill_at_step(5, *words, "--output-dir", tmp_path / "killed")
    code, _, err = deploykit(*words, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    assert "continuing the unfinished run" in err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1], "bit for bit"
    history = [load_manifest(tmp_path / name, "checkpoint").metrics["history"] for name in ("killed", "whole")]
    assert history[0]["evaluations"] == history[1]["evaluations"], "losses and answers, those before the kill too"


def test_a_smaller_student_learns_from_a_teacher(
    deploykit: Deploykit, run: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    words = (
        "finetune", *QUICK, "--teacher", run, "--student", "layers=1", "--train", rows, "--max-steps", 6,
        "--eval-steps", 2, "--output-dir", out, "--learning-rate", 1e-3, "--distill-alpha", 0.9,
    )  # fmt: skip
    kill_at_step(5, *words)
    code, told, err = deploykit(*words)
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert "the student has the layers [0]" in err
    assert "teacher" in told
    metrics = load_manifest(out, "checkpoint").metrics
    assert metrics["teacher"] == metrics["before"], "the same model: it is measured once"
    assert "| teacher |" in (out / "README.md").read_text().replace("| before ", "")
    assert "from a teacher, `run`" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    code, told, _ = deploykit("finetune", "--config", out / "finetune.toml", "--output-dir", out)
    assert code == 0
    assert "reused" in told
    code, _, err = deploykit("generate", out, "list the file here", "--max-new-tokens", 4)
    assert code == 0, err
    # Another teacher is measured besides.
    code, _, err = deploykit("finetune", *QUICK, base, "--teacher", run, "--train", rows, "--max-steps", 2,
                             "--output-dir", tmp_path / "r", "--lora-r", 2)  # fmt: skip
    assert code == 0, err
    assert "measuring the teacher" in err
    metrics = load_manifest(tmp_path / "r", "checkpoint").metrics
    assert metrics["teacher"]["test"]["loss"] < metrics["before"]["test"]["loss"]
    assert metrics["differences"].keys() == {"before", "teacher"}


def test_a_page_shows_the_forms_of_an_export(run: Path, export: Path, tmp_path: Path) -> None:
    metrics = load_manifest(export, "export").metrics
    write_run_page("Demo", load_manifest(run, "checkpoint").metrics, tmp_path / "page.html", export=metrics)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    ratios = [metrics["quantization"][name]["perplexity_ratio"] for name in ("int8", "int4")]
    ratios += [found["perplexity_ratio"] for found in metrics["quantization"].get("native", {}).values()]
    assert all(f"perplexity × {ratio:.4f}" in text for ratio in ratios)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_a_checkpoint_and_goes_on(
    deploykit: Deploykit, base: Path, rows: Path, tmp_path: Path, number: int
) -> None:
    words = ("finetune", *QUICK, base, "--train", rows, "--max-steps", 6, "--eval-steps", 6, "--output-dir")
    code, told = signal_at_step(number, 2, *words, tmp_path / "stopped")
    assert code == 128 + number, told
    assert told.splitlines()[-1].endswith("interrupted: the same command continues from step 3 (--restart starts over)")
    assert not (tmp_path / "stopped").exists()
    for name in ("stopped", "whole"):
        code, _, err = deploykit(*words, tmp_path / name)
        assert code == 0, err
        assert ("continuing the unfinished run" in err) == (name == "stopped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1], "bit for bit"


def test_a_run_interrupted_before_its_first_step_says_that_it_starts_over(
    deploykit: Deploykit, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual_signals: None
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("deploykit.tasks.text_generation.training.train", interrupt)
    code, _, err = deploykit(
        "finetune", *QUICK, base, "--train", rows, "--max-steps", 6, "--output-dir", tmp_path / "a"
    )
    assert code == 143
    assert err.splitlines()[-1] == "error: interrupted before the first checkpoint: the same command starts over"
    assert signal.getsignal(signal.SIGTERM) is before


def test_answers_that_were_interrupted_go_on(
    deploykit: Deploykit, export: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", export, "--input", rows, "--max-new-tokens", 4, "--json", "--output")
    code, _, err = deploykit(*words, tmp_path / "whole.jsonl")
    assert code == 0, err
    with monkeypatch.context() as patched:
        parts = iter([generate.answers])  # the second part of the rows is not answered

        def answers(*arguments: Any, **named: Any) -> Any:
            part = next(parts, None)
            if part is None:
                raise KeyboardInterrupt
            return part(*arguments, **named)

        patched.setattr(generate, "answers", answers)
        assert deploykit(*words, tmp_path / "again.jsonl")[0] == 130
    assert not (tmp_path / "again.jsonl").exists()
    code, out, err = deploykit(*words, tmp_path / "again.jsonl")
    assert code == 0, err
    assert json.loads(out)["resumed"] == 64
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_odd_rows_to_answer(deploykit: Deploykit, run: Path, tmp_path: Path) -> None:
    generator = TorchGenerator.load(run)
    asked = [{"role": "user", "content": "list the file here"}]
    generator.tokenizer.template = ChatTemplate("{{ tools | tojson }}{{ messages[0].content }}", {})
    tools = [{"type": "function", "function": {"name": "ls"}}]
    with_tools, without = generator.generate(
        [generator.tokenizer.encode_prompt(asked, given) for given in (tools, None)], Sampling(max_new_tokens=4)
    )
    found = generator.reply([{"messages": asked, "tools": tools}, asked], Sampling(max_new_tokens=4))
    assert found == [with_tools, without]
    assert with_tools[0].prompt_tokens > without[0].prompt_tokens
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "tools"])
        writer.writerows(
            [
                [json.dumps(asked), ""],
                [json.dumps(asked), json.dumps(tools)],
                [json.dumps([{"role": "user", "content": [{"type": "image_url"}]}]), ""],
                [json.dumps([{"role": "narrator", "content": "a"}]), ""],
                ["no json", ""],
                [json.dumps(asked), '["ls"]'],
            ]
        )
    code, _, _ = deploykit("generate", run, "--input", table, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 4)
    assert code == 1
    first, *others = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["prompt"] == asked
    for record, told in zip(
        others,
        (
            "template does not write them",
            "messages[0].content[0] is not a text",
            "messages[0].role is 'narrator'",
            "should hold JSON",
            "tools[0] has no",
        ),
        strict=True,
    ):
        assert told in record["error"]


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """Eight rows with unequal numbers of supervised tokens, as one batch and as eight."""
    generator = np.random.default_rng(0)
    rows = [EncodedRow(generator.integers(6, 390, 16), np.arange(16) > i) for i in range(1, 9)]
    after = []
    for tokens, accumulation in ((128, 1), (16, 8)):
        model = random_model("llama")
        facts = checkpoint_facts(model.config, model.generation_config, tokenizer(CHATML))
        options = TextGenerationOptions(
            model="m", train="t", batch_tokens=tokens, gradient_accumulation_steps=accumulation, max_steps=1, optimizer="sgd",
            learning_rate=0.1, lr_scheduler_type="constant", warmup_ratio=0, weight_decay=0, mixed_precision="no", max_grad_norm=0,
        )  # fmt: skip
        trained, _ = train(model, rows, rows[:2], facts, options, tmp_path / str(tokens), lambda line: None)
        after.append(trained.state_dict())
    start = random_model("llama").state_dict()
    for name, value in after[0].items():
        step = (value - start[name]).abs().max()
        assert (after[1][name] - value).abs().max() <= 1e-3 * step + 1e-7, name
