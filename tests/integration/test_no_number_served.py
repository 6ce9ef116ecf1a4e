"""On a real Triton, by HTTP, gRPC and the OpenAI port, only the row or request whose model computes NaN gets an error."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import onnx
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from language_models import random_model, write_export
from overflowing import EMBEDDINGS, ROWS, write_overflowing
from safetensors.numpy import load_file
from served import wait_until
from tiny_answerer import write_export as write_answerer_export
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from deploykit.artifacts import MANIFEST, load_manifest, write_manifest
from deploykit.errors import DataError
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.stages.export import export
from deploykit.tasks.opening import open_served
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.repository import package

TOLD = "the model computed no number for this text (NaN or infinity)"
MODES = [tritonclient.http, tritonclient.grpc]


def without_numbers(export: Path, embedding: np.ndarray[Any, Any], word: str) -> Path:
    """Make NaN of the embedding of ``word`` in all files of an export."""
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    [token] = tokenizer.encode(word, add_special_tokens=False).ids
    row = embedding[token].astype(np.float32)
    nothing = np.full_like(row, np.nan)
    changed = 0
    for path in export.iterdir():
        if path.is_file() and row.tobytes() in (content := path.read_bytes()):
            path.write_bytes(content.replace(row.tobytes(), nothing.tobytes()))
            changed += 1
    assert changed
    facts = load_manifest(export, "export", verify=False).task
    (export / MANIFEST).unlink()
    write_manifest(export, "export", facts, inputs="broken")
    return export


@pytest.fixture(scope="module")
def served(
    make_tiny_export: Callable[..., Path],
    make_tiny_checkpoint: Callable[..., Path],
    make_tiny_translation: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exports")
    classifier = make_tiny_export(folder / "classifier")
    [embedding] = (i for i in onnx.load(classifier / "model.onnx").graph.initializer if i.name == "embeddings")
    answerer = write_answerer_export(folder / "answerer")
    weights = load_file(folder / "answerer" / "checkpoint" / "model.safetensors")
    model = random_model("llama").get_input_embeddings().weight.detach().numpy()
    data = folder / "fr.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS["translation"][::2])))
    options = ExportOptions(data=str(data), source_lang="en", target_lang="fr")
    translator = write_overflowing(folder / "fr", "translation", make_tiny_checkpoint, make_tiny_translation)
    exports = {
        "classification": without_numbers(classifier, onnx.numpy_helper.to_array(embedding), "w7"),
        "question-answering": without_numbers(answerer, weights[EMBEDDINGS["question-answering"]], "w7"),
        "text-generation": without_numbers(write_export(folder / "lm", template=CHATML), model, "X"),
        "translation": export(translator, folder / "translator", options, say=lambda line: None).path,
    }
    for task, made in exports.items():
        settings = {} if task in ("classification", "question-answering") else {"settings": ServingSettings(threads=1)}
        package(made, task, folder / "repository", engine="onnxruntime", precision="fp32", **settings)
    ports = [word for kind in ("http", "grpc", "metrics", "openai") for word in (f"--{kind}-port", "0")]
    command = [sys.executable, "-m", "deploykit", "serve", "--model-repository", str(folder / "repository"), *ports]
    ready = folder / "ready.json"
    process = subprocess.Popen([*command, "--ready-file", str(ready)], stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: ready.exists() or process.poll() is not None, 90)
        assert ready.exists(), process.communicate()[1]
        yield json.loads(ready.read_text())
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=30)
        assert "Traceback" not in printed
    finally:
        process.kill()
        process.wait()


def infer(served: dict[str, Any], api: ModuleType, model: str, **columns: Sequence[str]) -> dict[str, list[Any]]:
    """Ask by one of Triton's clients. Returns the outputs."""
    inputs = []
    for name, values in columns.items():
        tensor = api.InferInput(name, [len(values), 1] if name.isupper() else [len(values)], "BYTES")
        tensor.set_data_from_numpy(np.array([v.encode() for v in values], np.object_).reshape(tensor.shape()))
        inputs.append(tensor)
    url = served["http" if api is tritonclient.http else "grpc"].split("://")[-1]
    with api.InferenceServerClient(url) as client:
        found = client.infer(model, inputs)
        response = found.get_response()
        named = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [one["name"] if isinstance(one, dict) else one.name for one in named]
        return {name: found.as_numpy(name).reshape(-1).tolist() for name in names}


@pytest.mark.parametrize("api", MODES)
@pytest.mark.parametrize(
    ("model", "answer", "columns"),
    [
        ("classification", "LABEL", {"TEXT": ["w1 w2", "w1 w7", "w3"]}),
        ("question-answering", "ANSWER", {"QUESTION": ["w1 ?"] * 3, "CONTEXT": ["w2 w3", "w7 w3", "w4"]}),
        ("translation", "TRANSLATION", {"TEXT": ["fox", "fox %", "dog"]}),
    ],
)
def test_a_row_fails_alone(
    served: dict[str, Any], api: ModuleType, model: str, answer: str, columns: dict[str, list[str]]
) -> None:
    found = infer(served, api, model, **columns)
    assert [error.decode().partition(":")[0] for error in found["ERROR"]] == ["", TOLD, ""]
    for row in (0, 2):
        alone = infer(served, api, model, **{name: values[row : row + 1] for name, values in columns.items()})
        assert found[answer][row] == alone[answer][0] != b""
    assert found[answer][1] == b""
    with pytest.raises(InferenceServerException, match="computed no number"):
        infer(served, api, model, **{name: values[1:2] for name, values in columns.items()})


def generate_by_http(served: dict[str, Any], prompt: str, *, stream: bool) -> str:
    """Return the text, or raise ValueError with the error."""
    route = "generate_stream" if stream else "generate"
    request = {"text_input": prompt, "max_new_tokens": 5, "stream": stream, "exclude_input_in_output": True}
    response = httpx.post(f"{served['http']}/v2/models/text-generation/{route}", json=request, timeout=60)
    lines = [line.removeprefix("data:") for line in response.text.splitlines() if line.strip()]
    found = [json.loads(line) for line in lines]
    if errors := [one["error"] for one in found if "error" in one]:
        raise ValueError(errors[0])
    return "".join(one["text_output"] for one in found)


def generate_by_grpc(served: dict[str, Any], prompt: str, *, stream: bool) -> str:
    api = tritonclient.grpc
    inputs = []
    for name, value in {"text_input": prompt, "sampling_parameters": json.dumps({"max_new_tokens": 5})}.items():
        tensor = api.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value.encode()], np.object_))
        inputs.append(tensor)
    for name, flag in (("stream", stream), ("exclude_input_in_output", True)):
        tensor = api.InferInput(name, [1], "BOOL")
        tensor.set_data_from_numpy(np.array([flag]))
        inputs.append(tensor)
    results: queue.Queue[Any] = queue.Queue()
    with api.InferenceServerClient(served["grpc"].split("://")[-1]) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        client.async_stream_infer("text-generation", inputs, enable_empty_final_response=True)
        text = ""
        while True:
            result, error = results.get(timeout=60)
            if error is not None:
                raise ValueError(str(error))
            response = result.get_response()
            if (output := result.as_numpy("text_output")) is not None:
                text += "".join(piece.decode() for piece in output.reshape(-1))
            if response.parameters["triton_final_response"].bool_param:
                return text


def test_the_client_of_an_answerer_knows_why_a_question_fails(served: dict[str, Any]) -> None:
    answerer = open_served("question-answering", served["http"])
    found = answerer.try_all([("w1 ?", "w2 w3"), ("w1 ?", "w7 w3"), ("w1 " * 200, "w2")])
    answerer.close()
    assert [isinstance(one, NoNumberError) for one in found] == [False, True, False]
    assert isinstance(found[2], DataError)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("generate", [generate_by_http, generate_by_grpc])
def test_a_prompt_fails_alone(served: dict[str, Any], generate: Callable[..., str], stream: bool) -> None:
    alone = [generate(served, prompt, stream=stream) for prompt in ("list", "show")]
    assert all(alone)
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(generate, served, prompt, stream=stream) for prompt in ["list", "list X", "show"] * 4]
        for number, one in enumerate(asked):
            if number % 3 == 1:
                with pytest.raises(ValueError, match="computed no number"):
                    one.result()
            else:
                assert one.result() == alone[number % 3 // 2]


def test_the_openai_port_refuses_the_request_alone(served: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=served["openai"], api_key="x", max_retries=0) as client:

        def complete(prompt: str | list[str], **options: Any) -> Any:
            return client.completions.create(model="text-generation", prompt=prompt, max_tokens=5, **options)

        alone = complete("list").choices[0].text
        with ThreadPoolExecutor(6) as threads:
            asked = [threads.submit(complete, prompt) for prompt in ["list", "list X"] * 4]
            for one, other in zip(asked[::2], asked[1::2]):
                assert one.result().choices[0].text == alone
                with pytest.raises(openai.BadRequestError, match="computed no number"):
                    other.result()
        assert "".join(piece.choices[0].text for piece in complete("list", stream=True)) == alone
        with pytest.raises((openai.APIError, httpx.HTTPError), match="computed no number"):
            list(complete("list X", stream=True))
        with pytest.raises(openai.BadRequestError, match="computed no number"):
            client.chat.completions.create(model="text-generation", messages=[{"role": "user", "content": "X"}])
        with pytest.raises(openai.BadRequestError, match="computed no number"):
            client.responses.create(model="text-generation", input="X")


@pytest.mark.parametrize(("model", "route"), [("classification", "classify"), ("translation", "translate")])
def test_the_openai_port_refuses_a_text_alone(served: dict[str, Any], model: str, route: str) -> None:
    key = next(iter(set(ROWS[model][0]) & {"text", "en"}))
    texts = [row[key] for row in ROWS[model]]
    rows = httpx.post(f"{served['openai']}/{route}", json={"model": model, "input": texts}, timeout=30).json()["data"]
    assert [row.get("error", "").startswith(TOLD) for row in rows] == [False, True, False]
