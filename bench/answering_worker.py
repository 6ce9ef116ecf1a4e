"""Answer questions with one engine: read a job (JSON) from stdin, then requests, one a line.

It runs in the engine's own virtual environment, so it imports only the engine and its dependencies.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Pair = Sequence[str]
"""A question and its context."""
Answer = Callable[[Sequence[Pair]], list[tuple[str, int, int]]]
"""Returns text, start and end of the best span for each pair."""

MAX_QUESTION = 10_000
"""Tokens; transformers' pipeline truncates longer questions, by default to 64."""


def main() -> None:
    # Output of a library must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    answer = ENGINES[job["engine"]](job)
    print(json.dumps({"open_s": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        calls = json.loads(line)["calls"]
        seconds, found = [], []
        for pairs in calls:
            started = time.perf_counter()
            found += answer(pairs)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds, "answers": found}), file=answers, flush=True)


def open_deploykit(job: Mapping[str, Any]) -> Answer:
    from deploykit.artifacts import load_manifest
    from deploykit.tasks.opening import open_graph
    from deploykit.tasks.question_answering.predictor import Answerer

    folder = Path(job["folder"])
    model = open_graph(
        folder, load_manifest(folder), engine=job["runs"], precision=job["precision"], threads=job["threads"]
    )
    assert isinstance(model, Answerer)

    def answer(pairs: Sequence[Pair]) -> list[tuple[str, int, int]]:
        best = [found.spans[0] for found in model.find([(question, context) for question, context in pairs])]
        return [(span.text, span.start, span.end) for span in best]

    return answer


def open_checkpoint(job: Mapping[str, Any]) -> Answer:
    """Run deploykit on PyTorch, with windows of the given sizes and without a threshold."""
    import dataclasses

    import torch

    from deploykit.tasks.question_answering.checkpoint import TorchAnswerer

    torch.set_num_threads(job["threads"])
    loaded = TorchAnswerer.load(Path(job["folder"]))
    chosen = {name: job[name] for name in ("max_length", "doc_stride", "max_answer_length")}
    task = dataclasses.replace(loaded.task, no_answer_threshold=None, whole_words=True, **chosen)
    model = TorchAnswerer(loaded.model, loaded.hub_tokenizer, task)

    def answer(pairs: Sequence[Pair]) -> list[tuple[str, int, int]]:
        best = [found.spans[0] for found in model.find([(question, context) for question, context in pairs])]
        return [(span.text, span.start, span.end) for span in best]

    return answer


def open_transformers(job: Mapping[str, Any]) -> Answer:
    from transformers import AutoModelForQuestionAnswering

    return _pipeline(AutoModelForQuestionAnswering.from_pretrained(job["folder"]).eval(), job)


def open_optimum(job: Mapping[str, Any]) -> Answer:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForQuestionAnswering

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    model = ORTModelForQuestionAnswering.from_pretrained(job["folder"], file_name=job["file"], session_options=options)
    return _pipeline(model, job)


def open_openvino(job: Mapping[str, Any]) -> Answer:
    """Run a compiled model in transformers' pipeline, as optimum-intel's OVModelForQuestionAnswering does."""
    import openvino as ov
    import torch
    from transformers import AutoConfig, AutoModelForQuestionAnswering
    from transformers.modeling_outputs import QuestionAnsweringModelOutput

    properties = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(job["file"], "CPU", properties).create_infer_request()
    names = {name for port in request.model_inputs for name in port.get_names()}
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(job["folder"]))

    def forward(**inputs: Any) -> QuestionAnsweringModelOutput:
        request.infer({name: array.numpy() for name, array in inputs.items() if name in names})
        start, end = (torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in (0, 1))
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)

    model.forward = forward
    return _pipeline(model, job)


def _pipeline(model: Any, job: Mapping[str, Any]) -> Answer:
    """Return transformers' QuestionAnsweringPipeline on ``model``."""
    import torch
    from transformers import AutoTokenizer, QuestionAnsweringPipeline

    torch.set_num_threads(job["threads"])
    pipeline = QuestionAnsweringPipeline(model, AutoTokenizer.from_pretrained(job["tokenizer"]), framework="pt")
    sizes = {"max_seq_len": job["max_length"], "doc_stride": job["doc_stride"], "max_question_len": MAX_QUESTION,
             "max_answer_len": job["max_answer_length"]}  # fmt: skip

    def answer(pairs: Sequence[Pair]) -> list[tuple[str, int, int]]:
        questions, contexts = zip(*pairs)
        found = pipeline(question=list(questions), context=list(contexts), **sizes)
        return [(one["answer"], one["start"], one["end"]) for one in (found if isinstance(found, list) else [found])]

    return answer


ENGINES: Mapping[str, Callable[[Mapping[str, Any]], Answer]] = {
    "deploykit": open_deploykit,
    "deploykit checkpoint": open_checkpoint,
    "transformers": open_transformers,
    "optimum": open_optimum,
    "OpenVINO": open_openvino,
}


if __name__ == "__main__":
    main()
