"""GGUF exports answer in llama.cpp as in PyTorch. Its bindings (xllamacpp) are in a virtual environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import command_rows, random_model, tokenizer

from deploykit.graphs.gguf_file import write_gguf
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import checkpoint_facts
from deploykit.tasks.text_generation.export import reopened_gguf

PYTHON = Path(os.environ.get("LLAMA_VENV", "/tmp/deploykit-llama")) / "bin" / "python"
TOKENS = 16

_ASK = """
import json, sys
from urllib.request import Request, urlopen
import xllamacpp as llama
path, dialogs, count = sys.argv[1], *json.load(sys.stdin)
params = llama.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 512, 1, 1, False
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = llama.Server(params)
def ask(name, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{server.listening_address}/{name}", data, {"Content-Type": "application/json"})
    return json.load(urlopen(request))
answers = []
for messages in dialogs:
    text = ask("apply-template", {"messages": messages})["prompt"]
    ids = ask("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
    asked = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    answers.append([ids, ask("completion", asked)["tokens"]])
print(json.dumps({"answers": answers}), flush=True)
"""


SETTINGS: dict[str, dict[str, Any]] = {
    "llama linear": {"mlp_bias": False},
    "mistral": {"sliding_window": 256},  # the whole context: a shorter one is refused
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128},
}
TIE = 0.02
"""llama.cpp rounds activations, to f16 or to 8 bits: where two logits are closer, it may choose either."""


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "f16"),
        ("llama", "q8_0"),
        ("llama", "q4_0"),
        ("llama linear", "f16"),
        ("mistral", "f16"),
        ("qwen2", "f16"),
        ("qwen3", "f16"),
    ],
)
def test_llama_cpp_gives_the_same_prompts_and_tokens(family: str, kind: str, tmp_path: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip(f"no llama.cpp at {PYTHON}: `make interop` makes that environment, from a package registry")
    own = tokenizer(CHATML)
    model = random_model(family, **SETTINGS.get(family, {}))
    facts = checkpoint_facts(model.config, model.generation_config, own)
    path = tmp_path / "model.gguf"
    write_gguf(model, own, facts.eos_token_ids, kind, path)  # type: ignore[arg-type]
    # The values in the file, so that rounded weights are compared with themselves.
    reference = reopened_gguf(path, model)
    dialogs = [[{"role": "user", "content": row["prompt"]}] for row in command_rows()[::12]]
    done = subprocess.run(
        (str(PYTHON), "-c", _ASK, str(path)), input=json.dumps([dialogs, TOKENS]), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    prompts = [reference.tokenizer.encode_prompt(messages) for messages in dialogs]
    assert [ids for ids, _ in told["answers"]] == prompts
    compared = 0
    for prompt, (_, theirs), [answer] in zip(
        prompts, told["answers"], reference.generate(prompts, Sampling(max_new_tokens=TOKENS))
    ):
        ours = [i for i in answer.ids if i not in facts.eos_token_ids]
        parts = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        compared += len(ours) if parts is None else parts
        if parts is None:
            assert ours == theirs
        else:
            with torch.inference_mode():
                logits = reference.torch_model(torch.tensor([[*prompt, *ours[:parts]]])).logits[0, -1]
            assert float(logits[ours[parts]] - logits[theirs[parts]]) < TIE
    assert compared > 3 * len(prompts)
