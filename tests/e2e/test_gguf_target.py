"""A GGUF file is a checkpoint to export, evaluate and generate; two models are evaluated side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from language_models import random_model, tokenizer, write_rows

from deploykit.graphs.gguf_file import write_gguf
from deploykit.tasks.text_generation.chat_template import CHATML

Deploykit = Callable[..., tuple[int, str, str]]


def test_a_gguf_file_is_exported_evaluated_and_answers(deploykit: Deploykit, tiny_export: Path, tmp_path: Path) -> None:
    gguf, export, rows = tmp_path / "tiny.gguf", tmp_path / "export", write_rows(tmp_path / "rows.jsonl")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = random_model("llama linear", mlp_bias=False, tie_word_embeddings=True, rope_parameters=rope)
    write_gguf(model, tokenizer(CHATML), (2, 4), "f16", gguf)

    code, _, err = deploykit("export", gguf, "--output-dir", export, "--data", rows)
    assert code == 0, err
    asked = ("list the file here", "--max-new-tokens", 8)
    code, theirs, err = deploykit("generate", gguf, *asked)
    assert code == 0, err
    code, ours, err = deploykit("generate", export, *asked)
    assert (code, ours) == (0, theirs), err

    sides = ("evaluate", export, "--baseline", gguf, "--data", rows, "--max-new-tokens", 4)
    code, out, err = deploykit(*sides, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["baseline"]["target"] == str(gguf)
    for name in ("perplexity", "token_accuracy"):
        low, high = record["metrics"]["intervals"][name]
        assert low <= record["baseline"]["metrics"][name] <= high
    code, out, err = deploykit(*sides)
    assert code == 0, err
    head, perplexity = (next(line for line in out.splitlines() if word in line) for word in ("tiny.gguf", "perplexity"))
    assert head.split() == [str(gguf), str(export)]
    assert perplexity.count("[") == 2

    code, _, err = deploykit("evaluate", gguf, "--baseline", tiny_export, "--data", rows)
    assert (code, "give two models of one task" in err) == (2, True), err
    code, _, err = deploykit("evaluate", gguf, "--baseline", gguf, "--data", rows)
    assert (code, "--baseline is" in err) == (2, True), err
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"no model")
    for words in (("export", junk, "--output-dir", tmp_path / "x", "--data", rows), ("generate", junk, "a")):
        code, _, err = deploykit(*words)
        assert (code, "junk.gguf" in err, "Traceback" in err) == (1, True, False), err
