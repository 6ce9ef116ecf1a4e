"""GGUF exports answer in llama.cpp as in PyTorch, from a virtual environment of its own: building it takes minutes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
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
import numpy as np
from llama_cpp import Llama
path, texts, count = sys.argv[1], *json.load(sys.stdin)
model = Llama(path, n_ctx=256, n_threads=1, logits_all=False, verbose=False)
answers = []
for text in texts:
    prompt = model.tokenize(text.encode(), add_bos=False, special=True)
    model.reset()
    ids = []
    for part in [prompt] + [[None]] * (count - 1):
        model.eval(ids[-1:] if part == [None] else part)
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
        ids.append(int(logits.argmax()))
        if ids[-1] == model.token_eos():
            break
    answers.append([prompt, ids])
print(json.dumps({"answers": answers, "template": model.metadata.get("tokenizer.chat_template")}))
"""


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "f16"), ("llama", "q8_0"), ("llama linear", "f16"), ("qwen3", "f16")]
)
def test_llama_cpp_gives_the_same_template_and_tokens(family: str, kind: str, tmp_path: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip(f"no llama-cpp-python at {PYTHON}: `make interop` builds it, from a package registry")
    own = tokenizer(CHATML)
    model = random_model(family, **({"mlp_bias": False} if family == "llama linear" else {}))
    facts = checkpoint_facts(model.config, model.generation_config, own)
    path = tmp_path / "model.gguf"
    write_gguf(model, own, facts.eos_token_ids, kind, path)  # type: ignore[arg-type]
    # What the file holds, so that rounded weights are compared with themselves.
    reference = reopened_gguf(path, model)
    texts = [
        reference.tokenizer.template.render([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True)
        for row in command_rows()[::20]
    ]
    done = subprocess.run(
        (str(PYTHON), "-c", _ASK, str(path)),
        input=json.dumps([texts, TOKENS]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["template"] == CHATML
    prompts = [reference.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [prompt for prompt, _ in told["answers"]] == prompts
    ours = reference.generate(prompts, Sampling(max_new_tokens=TOKENS))
    assert [ids for _, ids in told["answers"]] == [list(answer.ids) for [answer] in ours]
