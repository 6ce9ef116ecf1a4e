"""Exports of language models open in optimum-onnx and onnxruntime-genai, from a virtual environment of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from language_models import command_rows, write_checkpoint, write_rows

from deploykit.artifacts import load_manifest
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.engines import LANGUAGE_MODEL_FILES
from deploykit.runtime.sampling import Sampling
from deploykit.stages.export import export
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.predictor import load_generator

PYTHON = Path(os.environ.get("OPTIMUM_VENV", "/tmp/deploykit-optimum")) / "bin" / "python"
# optimum-onnx 0.1 makes empty caches from the config, and ignores the head size of Qwen3 and Gemma 2
# and the number of key heads of Phi-3 and Gemma 2.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"head_dim": 16}, "gemma3_text": {}, "gpt2": {}, "mistral": {}, "phi3": {"num_key_value_heads": 4},
    "smollm3": {}, "qwen2": {}, "gemma2": {"num_key_value_heads": 4, "head_dim": 16},
}  # fmt: skip
"""Families that both tools open, with the settings that they need."""
CALIBRATED = " calibrated"
TOKENS = 24
NEAR_TIE = 0.1
"""Difference of log-probabilities below which 8-bit activations of two engines may choose different tokens."""
pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no {PYTHON}: `make interop` makes that environment, from a package registry"
)

_OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, file, tokens = sys.argv[1:4]
model = ORTModelForCausalLM.from_pretrained(folder, file_name=file)
answers = []
for prompt in json.load(sys.stdin):
    ids = torch.tensor([prompt])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=int(tokens))
    answers.append(found[0, len(prompt):].tolist())
print(json.dumps(answers))
"""
_GENAI = """
import json, sys
import onnxruntime_genai as og
folder, file, tokens = sys.argv[1:4]
config = og.Config(folder)
config.overlay(json.dumps({"model": {"decoder": {"filename": file}}}))
model = og.Model(config)
answers = []
for prompt in json.load(sys.stdin):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + int(tokens), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(token) for token in generator.get_sequence(0)[len(prompt):]])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module", params=[*FAMILIES, f"llama{CALIBRATED}"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    name = request.param.removesuffix(CALIBRATED)
    calibrated = {"calibration_data": str(write_rows(folder / "calibration.jsonl")), "smooth_quant": 0.5}
    checkpoint = write_checkpoint(folder / "checkpoint", name, template=CHATML, **FAMILIES[name])
    options = ExportOptions(int8=True, int4=True, data=str(write_rows(folder / "rows.jsonl")), max_drop=100,
                            **(calibrated if name != request.param else {}))  # fmt: skip
    return export(checkpoint, folder / "export", options, say=lambda line: None).path


@pytest.mark.parametrize("script", [pytest.param(_OPTIMUM, id="optimum"), pytest.param(_GENAI, id="onnxruntime-genai")])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_another_tool_opens_an_export_and_gives_the_same_tokens(exported: Path, script: str, precision: Any) -> None:
    if script is _GENAI and "gpt2" in str(exported):
        assert not (exported / "genai_config.json").exists()
        pytest.skip("onnxruntime-genai wants other caches for GPT-2")
    decoder, weights = LANGUAGE_MODEL_FILES[precision]
    task = load_manifest(exported, "export").task
    generator = load_generator(exported, task, "onnxruntime", decoder, 1)
    prompts = [
        generator.tokenizer.encode_prompt([{"role": "user", "content": row["prompt"]}]) for row in command_rows()[:8]
    ]
    ours = [answer for [answer] in generator.generate(prompts, Sampling(max_new_tokens=TOKENS, logprobs=5))]
    done = subprocess.run(
        (str(PYTHON), "-c", script, str(exported), weights.removesuffix("_data"), str(TOKENS)), input=json.dumps(prompts), capture_output=True,
        text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for answer, their in zip(ours, json.loads(done.stdout.splitlines()[-1]), strict=True):
        step = next((i for i, (a, b) in enumerate(zip(answer.ids, their, strict=False)) if a != b), None)
        if step is not None:
            assert precision != "fp32"
            # Another order of sums rounds some activation to the next of its 256 values, and a near tie falls otherwise.
            top = {token["token_id"]: token["logprob"] for token in answer.logprobs[step]["top"]}
            assert top.get(their[step], -math.inf) > answer.logprobs[step]["logprob"] - NEAR_TIE
