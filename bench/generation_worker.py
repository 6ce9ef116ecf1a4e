"""Run one engine: read a job (JSON) from stdin, then requests, one a line, and answer each with its time and tokens.

It runs in the engine's own virtual environment, so it imports nothing but the engine and numpy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Ids = list[int]
Generate = Callable[[Sequence[Ids], int], list[Ids]]
"""Continues prompts of equal lengths by a number of tokens each, greedily and past end tokens."""

SLOTS = 32
SLOT_TOKENS = 640


def main() -> None:
    # Output of a library must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    generate, note = ENGINES[job["engine"]](job)
    print(json.dumps({"open_s": time.perf_counter() - started, "note": note}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        ids = generate(request["prompts"], request["new"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "ids": ids, "peak_memory_mb": peak_mb()}), file=answers, flush=True)


def peak_mb() -> float | None:
    """Return the most memory that this program had, in 1e6 bytes; getrusage would count that of its parent too."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), None)


def open_deploykit(job: Mapping[str, Any]) -> tuple[Generate, str]:
    from deploykit.artifacts import load_manifest
    from deploykit.runtime.sampling import Sampling
    from deploykit.tasks.text_generation.facts import TextGeneration
    from deploykit.tasks.text_generation.predictor import load_generator

    folder = Path(job["folder"])
    task = load_manifest(folder, "export").task
    assert isinstance(task, TextGeneration)
    generator = load_generator(folder, task, job["runs"], job["file"], job["threads"])

    def generate(prompts: Sequence[Ids], new: int) -> list[Ids]:
        sampling = Sampling(max_new_tokens=new, ignore_eos=True)
        return [list(answer.ids) for (answer,) in generator.generate(list(prompts), sampling)]

    return generate, job["runs"]


def open_transformers(job: Mapping[str, Any]) -> tuple[Generate, str]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(prompts: Sequence[Ids], new: int) -> list[Ids]:
        ids = torch.tensor(prompts)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        answers: list[Ids] = found[:, ids.shape[1] :].tolist()
        return answers

    return generate, f"generate, {model.config._attn_implementation} attention"


def start_llama(job: Mapping[str, Any]) -> Any:
    """Start llama.cpp's server on a free port."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = job["file"]
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * min(SLOT_TOKENS, job["context"])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    return llama.Server(params)


def open_llama(job: Mapping[str, Any]) -> tuple[Generate, str]:
    from urllib.request import Request, urlopen

    import xllamacpp as llama

    server = start_llama(job)

    def generate(prompts: Sequence[Ids], new: int) -> list[Ids]:
        asked = {"prompt": prompts, "n_predict": new, "temperature": 0, "samplers": ["temperature"], "ignore_eos": True,
                 "return_tokens": True, "cache_prompt": False}  # fmt: skip
        url = f"{server.listening_address}/completion"
        with urlopen(Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})) as response:
            told = json.load(response)
        answers = told if isinstance(told, list) else [told]
        return [answer["tokens"] for answer in sorted(answers, key=lambda answer: int(answer["index"]))]

    return generate, f"its server's loop over {SLOTS} slots; {llama.get_system_info().strip(' |')}"


def open_onnxruntime_genai(job: Mapping[str, Any]) -> tuple[Generate, str]:
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(job["folder"])
    session = {"intra_op_num_threads": job["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"filename": job["file"], "session_options": session}}}))
    model = genai.Model(config)

    def generate(prompts: Sequence[Ids], new: int) -> list[Ids]:
        length = len(prompts[0])
        params = genai.GeneratorParams(model)
        # An end token cannot come before the least length.
        params.set_search_options(
            max_length=length + new, min_length=length + new, do_sample=False, batch_size=len(prompts)
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(token) for token in generator.get_sequence(i)[length:]] for i in range(len(prompts))]

    return generate, "deploykit's export"


def open_openvino_genai(job: Mapping[str, Any]) -> tuple[Generate, str]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 1, SLOTS
    scheduler.enable_prefix_caching = False
    pipeline = genai.LLMPipeline(job["file"], "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=job["threads"])

    def generate(prompts: Sequence[Ids], new: int) -> list[Ids]:
        ids = np.array(prompts, np.int64)
        options = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        found = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), options)
        return [list(map(int, tokens)) for tokens in found.tokens]

    return generate, "LLMPipeline, continuous batching"


def open_ctranslate2(job: Mapping[str, Any]) -> tuple[Generate, str]:
    import ctranslate2

    generator = ctranslate2.Generator(
        job["folder"], device="cpu", compute_type=job["precision"], intra_threads=job["threads"]
    )
    tokens = json.loads((Path(job["folder"]) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts: Sequence[Ids], new: int) -> list[Ids]:
        found = generator.generate_batch(
            [[tokens[i] for i in prompt] for prompt in prompts],
            max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, max_batch_size=0,
        )  # fmt: skip
        return [list(result.sequences_ids[0]) for result in found]

    return generate, "generate_batch"


ENGINES: Mapping[str, Callable[[Mapping[str, Any]], tuple[Generate, str]]] = {
    "deploykit": open_deploykit,
    "deploykit native": open_deploykit,
    "transformers": open_transformers,
    "llama.cpp": open_llama,
    "onnxruntime-genai": open_onnxruntime_genai,
    "OpenVINO GenAI": open_openvino_genai,
    "CTranslate2": open_ctranslate2,
}


if __name__ == "__main__":
    main()
