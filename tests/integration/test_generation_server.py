"""Language models on a real Triton, asked by HTTP, gRPC and the OpenAI API: same answers, streams, cancellation, faults."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as grpc
from click.testing import CliRunner
from language_models import command_rows, write_export
from served import family, start, supervised, wait_until
from tritonclient.utils import InferenceServerException

from deploykit.artifacts import load_manifest
from deploykit.cli import main
from deploykit.demo import ask_by_openai
from deploykit.errors import DataError, ServerError, UsageError
from deploykit.openai.app import create_app
from deploykit.openai.measure import ask
from deploykit.openai.server import OpenAIServer
from deploykit.openai.triton_generator import TritonGenerator
from deploykit.runtime.engines.native.causal_lm import NativeCausalLm
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.opening import open_graph, open_served
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.served import ServedGenerator
from deploykit.triton import kubernetes
from deploykit.triton.load import parse
from deploykit.triton.monitoring import ALERTS, DASHBOARD
from deploykit.triton.preflight import listen
from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

ENDLESS: dict[str, Any] = {"max_new_tokens": 3900, "ignore_eos": True}
DIALOG = [{"role": "user", "content": "list the file here"}]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("lm") / "export", template=CHATML, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def local(export: Path) -> LocalGenerator:
    """The same model in this process."""
    generator = open_graph(export, load_manifest(export), threads=1)
    assert isinstance(generator, LocalGenerator)
    return generator


@pytest.fixture(scope="module")
def native_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("native") / "export", "gemma3_text", native=True)


@pytest.fixture(scope="module")
def server(
    export: Path, native_export: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    if lacks() is None:
        package(native_export, "native", repository, engine="native", settings=ServingSettings(threads=1, max_rows=8))
    package(export, "lm", repository, settings=ServingSettings(threads=1, max_rows=8, max_queue_size=32))
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    with start(repository) as server:
        yield server


@contextlib.contextmanager
def openai_port(server: TritonServer) -> Iterator[str]:
    app = create_app(
        server.tasks, TritonGenerator(server.urls.grpc), lambda name: open_served(name, server.urls.http), created=1,
        metrics_url=server.urls.metrics,
    )  # fmt: skip
    with OpenAIServer(app, listen("openai", "127.0.0.1", 0), drain=5.0) as opened:
        yield opened.url


@pytest.fixture(scope="module")
def url(server: TritonServer) -> Iterator[str]:
    with openai_port(server) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def metrics(server: TritonServer) -> dict[str, float]:
    """The metrics of the model "lm" that are deploykit's own."""
    text = urllib.request.urlopen(server.urls.metrics, timeout=10).read().decode()
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(("deploykit_", "nv_inference_pending")) and 'model="lm"' in line
    ]
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines}


def running(server: TritonServer) -> tuple[float, float]:
    """The answers that are decoded and the prompts that wait."""
    found = metrics(server)
    return found["deploykit_running_sequences"], found["deploykit_waiting_sequences"]


def idle(server: TritonServer) -> bool:
    return wait_until(lambda: running(server) == (0, 0), 20)


def test_answers_are_those_in_process(server: TritonServer, local: LocalGenerator, client: openai.OpenAI) -> None:
    served = open_served("lm", server.urls.http)
    assert isinstance(served, ServedGenerator)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in command_rows()[:12]] + ["list the", "copy"]
    for sampling in (Sampling(max_new_tokens=12, logprobs=0), Sampling(max_new_tokens=9, temperature=1.0, seed=5, n=3)):
        expected = local.reply(prompts, sampling)
        for ours, theirs in zip(served.reply(prompts, sampling), expected):
            assert not isinstance(ours, DataError)
            assert not isinstance(theirs, DataError)
            assert [(a.text, a.finish == "length", a.tokens) for a in ours] == [
                (a.text, a.finish == "length", a.tokens) for a in theirs
            ]
    [plain] = local.reply([DIALOG], Sampling(max_new_tokens=12))
    assert not isinstance(plain, DataError)
    assert "".join(served.stream(DIALOG, Sampling(max_new_tokens=12))) == plain[0].text
    answer = client.chat.completions.create(model="lm", messages=DIALOG, max_tokens=12)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == plain[0].text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (plain[0].prompt_tokens, plain[0].tokens)
    with pytest.raises(DataError, match=r"^messages is not a list"):
        list(served.stream([]))
    served.close()


def test_a_served_answer_is_explained_as_in_process(
    server: TritonServer, local: LocalGenerator, export: Path, tmp_path: Path
) -> None:
    served = open_served("lm", server.urls.http)
    assert isinstance(served, ServedGenerator)
    prompts = ["list the", "", DIALOG, [{"role": "user", "content": "copy"}]]
    scores = served.answer_logprobs(prompts, [9, 40, 2])
    assert scores == pytest.approx(local.answer_logprobs(prompts, [9, 40, 2]), abs=1e-3)
    served.close()
    found = {}
    for name, more in (("lm", ("--url", server.urls.http)), (str(export), ("--engine", "onnxruntime"))):
        page = tmp_path / f"{len(found)}.html"
        done = CliRunner().invoke(main, ["explain", name, "list the file here", "--output", str(page), "--json", *more])
        assert done.exit_code == 0, done.output
        (found[name],) = json.loads(done.stdout)["explanations"]
        assert page.read_text().count("<svg") == 1
    one, other = found["lm"], found[str(export)]
    assert one["answer"] == other["answer"]
    assert one["measure"] == "log-probability"
    weights = [[word["weight"] for word in each["words"]] for each in (one, other)]
    assert weights[0] == pytest.approx(weights[1], abs=1e-2)
    done = CliRunner().invoke(main, ["explain", "lm", "list", "--answer", "ls", "--url", server.urls.http])
    assert done.exit_code == 2
    assert "a served model explains only its own answers" in done.stderr


@pytest.mark.skipif(lacks() is not None, reason=f"the engine native does not run here: {lacks()}")
def test_the_engine_native_answers_as_in_process(server: TritonServer, native_export: Path) -> None:
    ours = open_graph(native_export, load_manifest(native_export), engine="native", threads=1)
    assert isinstance(ours, LocalGenerator)
    assert isinstance(ours.model, NativeCausalLm)
    served = open_served("native", server.urls.http)
    assert isinstance(served, ServedGenerator)
    prompts = [row["prompt"] for row in command_rows()[:24]]
    for sampling in (
        Sampling(max_new_tokens=40, logprobs=0, ignore_eos=True), Sampling(max_new_tokens=9, temperature=1.0, n=3),
        Sampling(max_new_tokens=9, num_beams=3),
    ):  # fmt: skip
        for answers, expected in zip(served.reply(prompts, sampling), ours.reply(prompts, sampling)):
            assert not isinstance(answers, DataError)
            assert not isinstance(expected, DataError)
            assert [(a.text, a.tokens) for a in answers] == [(a.text, a.tokens) for a in expected]
    served.close()


def test_many_streams_at_once_do_not_mix(url: str, local: LocalGenerator) -> None:
    prompts = [row["prompt"] for row in command_rows()[:24]]
    answers, figures = ask(url, "lm", prompts, concurrency=24, max_tokens=20)
    dialogs = [[{"role": "user", "content": prompt}] for prompt in prompts]
    expected = local.reply(dialogs, Sampling(max_new_tokens=20))
    assert [answer.text for answer in answers] == [a[0].text for a in expected if not isinstance(a, DataError)]
    assert figures.tokens == sum(answer.tokens for answer in answers) > 24
    assert all(answer.pieces for answer in answers if answer.text)


@pytest.mark.parametrize("asked", ["openai", "http", "grpc"])
def test_a_stream_has_few_pieces_per_second_and_all_of_the_text(
    server: TritonServer, url: str, local: LocalGenerator, asked: str
) -> None:
    stream = {"openai": _openai_stream, "http": _http_stream, "grpc": _grpc_stream}[asked]
    tokens = 1000
    [whole] = local.reply([DIALOG], Sampling(max_new_tokens=tokens, ignore_eos=True))
    assert not isinstance(whole, DataError)
    started = time.monotonic()
    pieces = [piece for piece in stream(server, url, tokens) if piece]
    seconds = time.monotonic() - started
    assert "".join(pieces) == whole[0].text
    assert 1 < len(pieces) <= 2 + seconds / 0.03


def test_the_demo_prints_answers_and_figures(url: str, local: LocalGenerator, tmp_path: Path) -> None:
    dialogs = [[{"role": "user", "content": row["prompt"]}] for row in command_rows()[:5]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": dialog}) + "\n" for dialog in dialogs))
    prompts = [dialog[0]["content"] for dialog in dialogs[:3]]
    said: list[str] = []
    loads = ask_by_openai(said.append, url, "lm", prompts, rows, 8)
    expected = local.reply(dialogs[:3], Sampling(max_new_tokens=8))
    assert said[1:4] == [f"{p}  ->  {a[0].text}" for p, a in zip(prompts, expected) if not isinstance(a, DataError)]
    figures = r" {n} at once: [1-9]\d* tokens/s, first token after \d+ ms .*"
    assert [bool(re.fullmatch(figures.format(n=n), line)) for n, line in zip((1, 5), said[4:], strict=True)] == [
        True
    ] * 2
    assert [load.concurrency for load in loads] == [1, 5]


def test_log_probabilities_of_prompt_and_answer(client: openai.OpenAI, local: LocalGenerator) -> None:
    answer = client.completions.create(model="lm", prompt="list the file", max_tokens=3, logprobs=2, echo=True).choices[
        0
    ]
    [[expected]] = local.generate(
        [local.tokenizer.encode_prompt("list the file")], Sampling(max_new_tokens=3, logprobs=2)
    )
    assert answer.logprobs is not None
    assert answer.logprobs.token_logprobs is not None
    count = expected.prompt_tokens
    assert answer.logprobs.token_logprobs[0] is None
    assert len(answer.logprobs.token_logprobs) == count + 3
    assert answer.logprobs.token_logprobs[count:] == pytest.approx([p["logprob"] for p in expected.logprobs], abs=1e-5)
    assert answer.text.startswith("list the file")
    ids = local.tokenizer.encode_prompt("list the file")
    again = client.completions.create(model="lm", prompt=[ids, ids[:1]], max_tokens=3, logprobs=2, echo=True)
    assert again.choices[0].text == answer.text
    assert again.choices[0].logprobs == answer.logprobs
    alone = again.choices[1].logprobs
    assert alone is not None
    assert alone.token_logprobs is not None
    assert (alone.token_logprobs[0], len(alone.token_logprobs)) == (None, 4), "one token has none before it"
    parts = client.completions.create(model="lm", prompt=[ids], max_tokens=3, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in parts) == answer.text


@pytest.mark.parametrize("asked", ["openai stream", "openai", "http stream", "http", "grpc stream", "grpc"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_goes_frees_its_row(server: TritonServer, url: str, asked: str, begun: bool) -> None:
    assert idle(server)
    before = metrics(server)["deploykit_generated_tokens_total"]
    if asked.startswith("openai"):
        _leave_openai(server, url, stream=asked.endswith("stream"), begun=begun)
    elif asked.startswith("http"):
        _leave_http(server, stream=asked.endswith("stream"), begun=begun)
    else:
        _leave_grpc(server, stream=asked.endswith("stream"), begun=begun)
    assert idle(server)
    assert metrics(server)["deploykit_generated_tokens_total"] - before < 3900


def _seen(server: TritonServer, *, begun: bool) -> None:
    if begun:
        assert wait_until(lambda: running(server)[0] > 0, 10)


def _leave_openai(server: TritonServer, url: str, *, stream: bool, begun: bool) -> None:
    address, path = url.removeprefix("http://").split("/", 1)
    connection = http.client.HTTPConnection(address, timeout=30)
    body = {"model": "lm", "messages": DIALOG, "stream": stream, "max_tokens": 3900, "ignore_eos": True}
    with contextlib.closing(connection):
        connection.request("POST", f"/{path}/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        _seen(server, begun=begun)
        if stream and begun:
            connection.getresponse().readline()
        assert connection.sock is not None
        connection.sock.close()


def _leave_http(server: TritonServer, *, stream: bool, begun: bool) -> None:
    connection = http.client.HTTPConnection(server.urls.http.removeprefix("http://"), timeout=30)
    body = {"messages": json.dumps(DIALOG), "stream": stream, "sampling_parameters": json.dumps(ENDLESS)}
    with contextlib.closing(connection):
        connection.request("POST", f"/v2/models/lm/generate{'_stream' * stream}", json.dumps(body))
        _seen(server, begun=begun)
        if stream and begun:
            connection.getresponse().readline()
        assert connection.sock is not None
        connection.sock.close()


def _leave_grpc(server: TritonServer, *, stream: bool, begun: bool) -> None:
    client = grpc.InferenceServerClient(server.urls.grpc)
    came = threading.Event()
    client.start_stream(lambda result, error: came.set())
    tensors = []
    for name, kind, value in (
        ("messages", "BYTES", json.dumps(DIALOG).encode()),
        ("sampling_parameters", "BYTES", json.dumps(ENDLESS).encode()),
        ("stream", "BOOL", stream),
    ):
        tensors.append(grpc.InferInput(name, [1], kind))
        tensors[-1].set_data_from_numpy(np.array([value], np.object_ if kind == "BYTES" else np.bool_))
    client.async_stream_infer("lm", tensors)
    _seen(server, begun=begun)
    if stream and begun:
        assert came.wait(20)
    client.stop_stream(cancel_requests=True)
    client.close()


@pytest.mark.parametrize("asked", ["openai", "openai stream", "http", "http stream", "grpc stream"])
def test_a_full_queue_refuses_some_and_answers_the_others_right(
    server: TritonServer, url: str, local: LocalGenerator, asked: str
) -> None:
    """200 clients, 8 rows and a queue of 32. A request of 8 beams holds the rows until the queue was full."""
    dialogs = [[{"role": "user", "content": f"{row['prompt']} {i}"}] for i in range(4) for row in command_rows()[:50]]
    ask = {"openai": _openai_whole, "openai stream": _openai_stream, "http": _http_whole, "http stream": _http_stream,
           "grpc stream": _grpc_stream}[asked]  # fmt: skip
    refused = threading.Event()

    def one(dialog: Any) -> str | None:
        try:
            return "".join(ask(server, url, 60, dialog))
        except ConnectionError as error:
            if not re.match(r"(Error code: 429 - |503: .*|)the queue is full", str(error)):
                raise
            refused.set()
            return None

    assert idle(server)
    first = http.client.HTTPConnection(server.urls.http.removeprefix("http://"), timeout=60)
    body = {"messages": json.dumps(DIALOG), "num_beams": 8, "max_tokens": 3900, "ignore_eos": True}
    first.request("POST", "/v2/models/lm/generate", json.dumps(body))
    assert wait_until(lambda: running(server)[0] == 8, 30)
    with ThreadPoolExecutor(len(dialogs)) as pool:
        asking = [pool.submit(one, dialog) for dialog in dialogs]
        full = refused.wait(60)
        first.close()
        answers = [each.result() for each in asking]
    assert full
    answered = [(dialog, answer) for dialog, answer in zip(dialogs, answers) if answer is not None]
    assert 32 <= len(answered) < 200, "the whole queue was answered"
    expected = local.reply([dialog for dialog, _ in answered], Sampling(max_new_tokens=60, ignore_eos=True))
    assert [answer for _, answer in answered] == [a[0].text for a in expected if not isinstance(a, DataError)]


def test_a_client_that_reads_nothing_stops_nobody(server: TritonServer, url: str, client: openai.OpenAI) -> None:
    assert idle(server)
    address, path = url.removeprefix("http://").split("/", 1)
    silent = [http.client.HTTPConnection(address, timeout=30) for _ in range(4)]
    body = {"model": "lm", "messages": DIALOG, "stream": True, "max_tokens": 3000, "ignore_eos": True}
    for connection in silent:
        connection.request("POST", f"/{path}/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    assert wait_until(lambda: running(server)[0] == 4, 10)
    answer = client.chat.completions.create(model="lm", messages=DIALOG, max_tokens=5)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert wait_until(lambda: running(server) == (0, 0), 60), "the others are decoded to their end"
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give one of text_input, input_ids and messages"),
        ({"text_input": "a", "messages": "[]"}, "give one of text_input, input_ids and messages"),
        ({"messages": "[]"}, "messages is not a list of at least one message"),
        ({"messages": "{"}, "messages is not JSON"),
        ({"messages": json.dumps([{"role": "robot", "content": "a"}])}, "messages[0].role is 'robot'"),
        (
            {"messages": json.dumps([{"role": "user", "content": [{"type": "image_url"}]}])},
            "messages[0].content[0] is not a text",
        ),
        ({"messages": json.dumps([{"role": "user", "content": None}])}, "messages[0].content is not a text"),
        ({"text_input": "a", "sampling_parameters": "[]"}, "sampling_parameters is not a JSON object"),
        ({"text_input": "a", "sampling_parameters": '{"temperature": -1}'}, "temperature is -1"),
        ({"text_input": "a", "sampling_parameters": '{"tempo": 1}'}, "unknown parameter tempo"),
        ({"text_input": "a", "sampling_parameters": '{"n": 9}'}, "n is 9, and the model decodes 8 answers at once"),
        ({"text_input": "a " * 5000}, "tokens, and the model's context holds 4,096"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "a", "sampling_parameters": '{"\\ud800": 1}'}, "unknown parameter \\ud800"),
        ({"text_input": "a", "tempo": 1}, "unknown parameter tempo"),
        ({"text_input": "a", "max_tokens": 1, "sampling_parameters": '{"max_new_tokens": 2}'}, "is given twice"),
        ({"messages": "[" * 200 + "]" * 200}, "messages is nested more than 64 levels deep"),
        ({"input_ids": []}, "the prompt is empty"),
        ({"input_ids": [5, 400]}, "input_ids[1] is 400, and the model has 400 tokens"),
        ({"input_ids": [-1]}, "input_ids[0] is -1"),
        ({"input_ids": ["7"]}, "'input_ids'"),
        ({"text_input": 5}, "'text_input'"),
        ({"messages": DIALOG}, "'messages'"),
        ({"text_input": "a", "sampling_parameters": [1]}, "'sampling_parameters'"),
        ({"text_input": "a", "sampling_parameters": {"seed": 1}}, "'sampling_parameters'"),
        ({"text_input": "a", "stream": "yes"}, "'stream'"),
        ({"text_input": "a", "stream": None}, "'stream'"),
        ({"text_input": "a", "return_logprobs": 1}, "'return_"),
    ],
)
def test_bad_input_is_refused_by_field(server: TritonServer, inputs: dict[str, Any], message: str) -> None:
    connection = http.client.HTTPConnection(server.urls.http.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v2/models/lm/generate", json.dumps({"stream": False, **inputs}))
    response = connection.getresponse()
    assert response.status == 400
    assert message in json.loads(response.read())["error"]
    connection.close()


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages", r"has 5,0\d\d tokens.* holds 4,096"),
        ({"prompt": "a " * 5000}, "prompt", r"has 5,\d\d\d tokens.* holds 4,096"),
        ({"messages": DIALOG, "logit_bias": {"400": 1}}, "logit_bias", "the model has 400 tokens"),
        ({"messages": DIALOG, "n": 9}, "n", "decodes 8 answers at once"),
        (
            {"messages": DIALOG, "tools": [{"type": "function", "function": {"name": "ls"}}]},
            "tools", "chat template does not write them",
        ),
        (
            {"messages": DIALOG, "response_format": {"type": "json_schema", "json_schema": {"schema": {
                "type": "integer", "minimum": 5, "maximum": 2}}}},
            "response_format", "Unsatisfiable schema",
        ),
        ({"prompt": "a", "structured_outputs": {"json": {"type": "frog"}}}, "structured_outputs.json", "Invalid type"),
        pytest.param(
            {"model": "native", "messages": DIALOG}, "messages", "the model has no chat template",
            marks=pytest.mark.skipif(lacks() is not None, reason="the engine native does not run here"),
        ),
        ({"prompt": "a", "min_tokens": 3}, "min_tokens", "^min_tokens is 3, and max_tokens is 2"),
    ],
)  # fmt: skip
def test_what_the_model_refuses_is_named_by_field(url: str, body: dict[str, Any], param: str, told: str) -> None:
    route = "chat/completions" if "messages" in body else "completions"
    answer = httpx.post(f"{url}/{route}", json={"model": "lm", "max_tokens": 2, **body}, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert re.search(told, error["message"])
    assert error["code"] == ("context_length_exceeded" if "holds" in told else "invalid_value")


def test_parameters_of_the_request_are_those_of_sampling(server: TritonServer, local: LocalGenerator) -> None:
    """As Triton's vLLM backend is asked."""
    for body in (
        {"parameters": {"max_tokens": 3, "temperature": 0.5, "seed": 4, "exclude_input_in_output": True}},
        {"max_tokens": 3, "temperature": 0.5, "seed": 4, "exclude_input_in_output": True, "id": "of the request"},
    ):
        request = urllib.request.Request(
            f"{server.urls.http}/v2/models/lm/generate", json.dumps({"text_input": "list the", **body}).encode()
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.loads(response.read())
        [expected] = local.reply(["list the"], Sampling(max_new_tokens=3, temperature=0.5, seed=4))
        assert not isinstance(expected, DataError)
        assert answer["text_output"] == expected[0].text


def test_an_error_that_quotes_much_of_the_request_arrives(client: openai.OpenAI) -> None:
    """gRPC loses a status whose message is longer than 8 KiB."""
    with pytest.raises(
        openai.BadRequestError, match=r"regex cannot be used: .* invalid regex (?s:.*)change regex"
    ) as raised:
        client.chat.completions.create(
            model="lm", messages=DIALOG, extra_body={"structured_outputs": {"regex": "(" + "a" * 50_000}}  # type: ignore[arg-type]
        )  # fmt: skip
    assert raised.value.body["param"] == "structured_outputs.regex"  # type: ignore[index]


def test_compiling_large_schemas_delays_only_those_who_sent_them(client: openai.OpenAI) -> None:
    def ask(number: int | None) -> int | None:
        """Return the tokens of an answer; None if its schema proves to be too complex."""
        kinds = [{"type": "object", "properties": {f"k{number}.{i}": {}, "z": {}}} for i in range(1000)]
        format = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"anyOf": kinds}}}
        with contextlib.suppress(openai.BadRequestError):
            answer = client.chat.completions.create(  # type: ignore[call-overload]
                model="lm", messages=DIALOG, max_tokens=2,
                extra_body={} if number is None else {"response_format": format},
            )  # fmt: skip
            return int(answer.usage.completion_tokens)
        return None

    with ThreadPoolExecutor(6) as pool:
        large = [pool.submit(ask, number) for number in range(6)]
        assert wait_until(lambda: any(each.done() for each in large), 60)
        assert ask(None) == 2
        assert not all(each.done() for each in large), "their schemas wait for each other"


def test_every_metric_of_the_dashboard_and_the_rules_is_there(
    server: TritonServer, url: str, client: openai.OpenAI
) -> None:
    for _ in client.chat.completions.create(
        model="lm", messages=[{"role": "user", "content": "Hi"}], max_tokens=2, stream=True
    ):
        pass
    httpx.post(f"{url}/classify", json={"model": "tiny", "input": ["w1"]}).raise_for_status()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    text = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
    assert "deploykit_stage_cpu_seconds_total" in text
    there = {re.sub("_(bucket|sum|count)$", "", sample.name) for sample in parse(text)} | {s.name for s in parse(text)}
    adapter = Path(kubernetes.__file__).parent / "prometheus-adapter.yaml.j2"
    asked = set(re.findall(r"\b(?:nv|deploykit)_\w+", "".join(map(Path.read_text, (DASHBOARD, ALERTS, adapter)))))
    assert len(asked) > 15
    assert not asked - there
    own = {sample.name for sample in parse(text) if sample.name.startswith("deploykit_")}
    own = {re.sub("_(bucket|sum|count)$", "", name) for name in own}
    assert not {name for name in own if not any(name in one for one in asked)}, "metrics that the dashboard leaves out"


def test_top_shows_the_models(url: str, server: TritonServer) -> None:
    for address in (server.urls.metrics, url):
        done = CliRunner().invoke(main, ["top", address, "--json", "--interval", "0.1"])
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        assert {"lm", "tiny"} <= {model["model"] for model in record["models"]}
        assert ("port" in record) == (address == url)
    done = CliRunner().invoke(main, ["top", url, "--once", "--interval", "0.1"])
    assert done.exit_code == 0
    assert done.stdout.startswith("model")
    assert "OpenAI port: " in done.stdout


def test_other_tasks_answer_on_their_own_routes(url: str, client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"lm", "native", "tiny"}
    request = urllib.request.Request(
        f"{url}/classify",
        json.dumps({"model": "tiny", "input": ["w1 w2"]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200
        assert "positive" in response.read().decode()
    with pytest.raises(openai.BadRequestError, match="it does not generate text"):
        client.chat.completions.create(model="tiny", messages=DIALOG)  # type: ignore[arg-type]


def test_a_served_language_model_is_not_evaluated(server: TritonServer, tmp_path: Path) -> None:
    from deploykit.api import load

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(command_rows()[0]) + "\n")
    with load("lm", url=server.urls.http) as model:
        assert model.predict(["list the file"], max_new_tokens=4)[0].fields["tokens"] <= 4
        with pytest.raises(UsageError, match="cannot be evaluated"):
            model.evaluate(rows)


@pytest.mark.parametrize("asked", ["openai", "http", "grpc"])
def test_a_killed_process_ends_its_streams_and_is_replaced(export: Path, tmp_path: Path, asked: str) -> None:
    package(export, "lm", tmp_path, settings=ServingSettings(threads=1))
    with start(tmp_path) as server, openai_port(server) as url, supervised(server):
        stream = {"openai": _openai_stream, "http": _http_stream, "grpc": _grpc_stream}[asked]
        ours = open_served("lm", server.urls.http)
        assert isinstance(ours, ServedGenerator)
        own = ours.stream(DIALOG, Sampling(max_new_tokens=3900, ignore_eos=True))
        with contextlib.closing(stream(server, url, 3900)) as pieces, contextlib.closing(ours):
            next(pieces)
            next(own)
            family(server)[1].kill()
            killed = time.monotonic()
            with pytest.raises(ConnectionError, match=r"retry in some seconds|peer closed connection|Socket closed"):
                list(pieces)
            ended = time.monotonic()
            with pytest.raises(ServerError, match=r"ended the stream|loads it again"):
                list(own)
            assert "".join(ours.stream(DIALOG, Sampling(max_new_tokens=4))), "it asks until the model is there again"
        assert wait_until(lambda: _answers(stream(server, url, 4)), 30)
        answered = time.monotonic()
    print(f"{asked}: the stream ended after {ended - killed:.2f} s, an answer came after {answered - killed:.2f} s")
    assert answered - killed < 30  # 5 s where the machine does nothing else


def _answers(pieces: Iterator[str]) -> bool:
    with contextlib.suppress(ConnectionError), contextlib.closing(pieces):  # type: ignore[type-var]
        return bool(list(pieces))
    return False


def _plain_http() -> httpx.Client:
    """Return a client that is made at once: it reads no certificates."""
    return httpx.Client(timeout=60, verify=False, trust_env=False)


def _openai_stream(server: TritonServer, url: str, tokens: int, dialog: Any = DIALOG) -> Iterator[str]:
    """Yield the pieces of an answer. Raises ConnectionError with what the server says if it refuses or breaks off."""
    with _plain_http() as http, openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
        try:
            stream = client.chat.completions.create(
                model="lm", messages=dialog, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
            )
            with stream:
                for chunk in stream:
                    yield chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            raise ConnectionError(error.message) from error


def _openai_whole(server: TritonServer, url: str, tokens: int, dialog: Any) -> Iterator[str]:
    with _plain_http() as http, openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
        try:
            answer = client.chat.completions.create(
                model="lm", messages=dialog, max_tokens=tokens, extra_body={"ignore_eos": True}
            )
            yield answer.choices[0].message.content or ""
        except openai.RateLimitError as error:
            raise ConnectionError(error.message) from error


def _http_stream(server: TritonServer, url: str, tokens: int, dialog: Any = DIALOG) -> Iterator[str]:
    return _http(server, "generate_stream", tokens, dialog)


def _http_whole(server: TritonServer, url: str, tokens: int, dialog: Any) -> Iterator[str]:
    return _http(server, "generate", tokens, dialog)


def _http(server: TritonServer, route: str, tokens: int, dialog: Any) -> Iterator[str]:
    stream = route == "generate_stream"
    body = {"messages": json.dumps(dialog), "stream": stream, "max_tokens": tokens, "ignore_eos": True}
    try:
        address = f"{server.urls.http}/v2/models/lm/{route}"
        with _plain_http() as client, client.stream("POST", address, json=body) as answer:
            if answer.status_code != 200:
                raise ConnectionError(f"{answer.status_code}: {answer.read().decode()}")
            for line in answer.iter_lines():
                if line:
                    yield json.loads(line.removeprefix("data: "))["text_output"]
    except httpx.HTTPError as error:
        raise ConnectionError(str(error)) from error


def _grpc_stream(server: TritonServer, url: str, tokens: int, dialog: Any = DIALOG) -> Iterator[str]:
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    tensors = []
    for name, kind, value in (("messages", "BYTES", json.dumps(dialog).encode()), ("stream", "BOOL", True)):
        tensors.append(grpc.InferInput(name, [1], kind))
        tensors[-1].set_data_from_numpy(np.array([value], np.object_ if kind == "BYTES" else np.bool_))
    asked = {"max_tokens": tokens, "ignore_eos": True}
    with grpc.InferenceServerClient(server.urls.grpc) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        try:
            client.async_stream_infer("lm", tensors, parameters=asked, enable_empty_final_response=True)
            while True:
                result, error = results.get(timeout=60)
                if error is not None:
                    raise error
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return
                yield result.as_numpy("text_output")[0].decode()
        except InferenceServerException as error:
            raise ConnectionError(error.message()) from error
        finally:
            client.stop_stream(cancel_requests=True)
