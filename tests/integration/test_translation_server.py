"""Translation on a real Triton: in-flight batching, parameters, cancellation, streams, and killed processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from served import body, outputs, post, start, supervised, wait_until

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.cli import main
from deploykit.errors import ArtifactError, RequestError, ServerError, UsageError
from deploykit.runtime.generation import override
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.tasks.opening import open_graph, open_served
from deploykit.tasks.translation.predictor import Translator
from deploykit.tasks.translation.served import ServedTranslator, request_parameters
from deploykit.tasks.translation.translated import Translated
from deploykit.triton.repository import list_models, package, read_config
from deploykit.triton.server import TritonServer

LONG_LINE = ("open the file, close it. " * 2_000)[:50_000]
DOCUMENT = "  Hello, Dr. Smith! Save the file.\n\nDo you want it? No.   Yes \u2026 %s and {name} are here. " * 8
TEXTS = [
    "The quick brown fox",
    "",
    "   ",
    "\x00\x1b[0m\x7f control\tcharacters\r\n\x85 here",
    "\x01\x02",
    "...!?",
    "\U0001f600 le renard \u6a21\u578b \u05e9\u05dc\u05d5\u05dd",
    "e\u0301te\u0301 \u2028 \ufeff",
    *(f"open {i} files, close {i * 7 % 50}" + " please" * (i % 12) for i in range(40)),
]
SEARCHES: list[dict[str, Any]] = [
    {},
    {"beam_size": 4},
    {"beam_size": 3, "length_penalty": "0.5", "early_stopping": True},
    {"max_new_tokens": 7},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "min_new_tokens": 12},
    {"beam_size": 2, "early_stopping": "never", "length_penalty": 2},
]
LONG = {"beam_size": 4, "min_new_tokens": 127}
"""A slow search: 64 texts give 256 rows, each with as many steps as the model allows."""


@pytest.fixture(scope="module")
def repository(tiny_translation: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    package(tiny_translation, "fr", repository, settings=ServingSettings(threads=1))
    short = ServingSettings(threads=1, max_queue_size=8, max_rows=4)
    package(tiny_translation, "short-queue", repository, settings=short, stream=False)
    package(
        tiny_translation, "by-batch", repository, settings=ServingSettings(threads=1, in_flight=False), stream=False
    )
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with start(repository) as server:
        yield server


@pytest.fixture(scope="module")
def local(tiny_translation: Path) -> Translator:
    """The same model in this process."""
    translator = open_graph(tiny_translation, load_manifest(tiny_translation), threads=1)
    assert isinstance(translator, Translator)
    return translator


@pytest.fixture
def client(server: TritonServer) -> Iterator[ServedTranslator]:
    client = ServedTranslator("fr", server.urls.http)
    yield client
    client.close()


@pytest.fixture
def own_repository(tiny_translation: Path, tmp_path: Path) -> Path:
    """A repository that the test may damage."""
    package(tiny_translation, "fr", tmp_path / "repository", settings=ServingSettings(threads=1))
    return tmp_path / "repository"


def search(local: Translator, parameters: dict[str, Any]) -> Any:
    """Return the search parameters for request parameters, computed in this process."""
    plain = {k: float(v) if k == "length_penalty" else v for k, v in parameters.items()}
    return override(local.task, plain)


def assert_same(served: Sequence[Translated], expected: Sequence[Translated]) -> None:
    assert [dataclasses.replace(t, score=0.0) for t in served] == [dataclasses.replace(t, score=0.0) for t in expected]
    np.testing.assert_allclose([t.score for t in served], [t.score for t in expected], rtol=0, atol=1e-5)


def translated(answer: Any) -> list[Translated]:
    o = outputs(answer)
    rows = zip(o["TRANSLATION"], o["SCORE"], o["SOURCE_TOKENS"], o["TARGET_TOKENS"], o["FINISH"])
    return [Translated(*row) for row in rows]


def metric(server: TritonServer, name: str, model: str = "fr") -> float:
    with urllib.request.urlopen(server.urls.metrics) as answer:
        found = re.search(rf'^deploykit_{name}{{model="{model}"}} (\S+)$', answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def busy(server: TritonServer, model: str = "fr") -> bool:
    return metric(server, "running_sequences", model) > 0


def grpc_text(texts: Sequence[str], shape: Sequence[int]) -> Any:
    import tritonclient.grpc as triton

    text = triton.InferInput("TEXT", list(shape), "BYTES")
    text.set_data_from_numpy(np.array([t.encode() for t in texts], np.object_).reshape(shape))
    return text


def stub_of(server: TritonServer, model: str) -> psutil.Process:
    [stub] = [
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if f"/repository/{model}/" in " ".join(process.cmdline())
    ]
    return stub


# Clients


def test_answers_equal_those_in_process(client: ServedTranslator, local: Translator) -> None:
    assert client.task == local.task
    assert_same(client.translate(TEXTS), local.translate(TEXTS))
    assert [client.translate(TEXTS[1:3])[i].text for i in (0, 1)] == ["", ""]
    assert client.translate([]) == []
    assert {t.score for t in client.translate(TEXTS[:1], scored=False)} == {0.0}


@pytest.mark.parametrize("parameters", SEARCHES)
def test_another_search_is_sent_as_parameters(
    client: ServedTranslator, local: Translator, parameters: dict[str, Any]
) -> None:
    generation = search(local, parameters)
    assert_same(client.translate(TEXTS[:12], generation), local.translate(TEXTS[:12], generation))


def test_fields_that_a_request_cannot_change_are_refused_by_the_client(local: Translator) -> None:
    with pytest.raises(UsageError, match="bad_words of a served model cannot be changed"):
        request_parameters(local.task, dataclasses.replace(local.task.generation, bad_words=()))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_many_clients_at_once_with_searches_of_their_own_are_answered_right(
    server: TritonServer, local: Translator, protocol: str
) -> None:
    import tritonclient.grpc as triton

    requests = [(TEXTS[i % 8 : i % 8 + 1 + i % 5], SEARCHES[i % len(SEARCHES)]) for i in range(96)]
    grpc = triton.InferenceServerClient(server.urls.grpc)

    def ask(request: tuple[list[str], dict[str, Any]]) -> list[Translated]:
        texts, parameters = request
        if protocol == "http":
            status, answer = post(server, body(texts, parameters=parameters), "fr")
            assert status == 200, answer
            return translated(answer)
        as_text = {k: str(v) if isinstance(v, float) else v for k, v in parameters.items()}
        found = grpc.infer("fr", [grpc_text(texts, (len(texts), 1))], parameters=as_text)
        names = ("TRANSLATION", "SCORE", "SOURCE_TOKENS", "TARGET_TOKENS", "FINISH")
        columns = [found.as_numpy(name).reshape(-1).tolist() for name in names]
        return [Translated(text.decode(), *rest, finish.decode()) for text, *rest, finish in zip(*columns)]

    with grpc, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, requests))
    for (texts, parameters), answer in zip(requests, answers):
        assert_same(answer, local.translate(texts, search(local, parameters)))


def test_only_the_outputs_asked_for_come(server: TritonServer) -> None:
    wanted = body(["the fox"], outputs=[{"name": "TRANSLATION"}, {"name": "FINISH"}])
    assert set(outputs(post(server, wanted, "fr")[1])) == {"TRANSLATION", "FINISH"}


def test_a_bad_row_fails_alone(server: TritonServer, local: Translator) -> None:
    import tritonclient.http as triton

    text = triton.InferInput("TEXT", [4, 1], "BYTES")
    rows = [TEXTS[0].encode(), b"ab\xff", LONG_LINE.encode(), TEXTS[9].encode()]
    text.set_data_from_numpy(np.array(rows, np.object_).reshape(4, 1))
    with triton.InferenceServerClient(server.urls.http.removeprefix("http://")) as client:
        answer = client.infer("fr", [text], parameters={"long_input": "refuse"})
    good = local.translate([TEXTS[0], TEXTS[9]])
    assert [t.decode() for t in answer.as_numpy("TRANSLATION")[:, 0]] == [good[0].text, "", "", good[1].text]
    assert [f.decode() for f in answer.as_numpy("FINISH")[:, 0]] == [good[0].finish, "", "", good[1].finish]
    assert answer.as_numpy("TARGET_TOKENS")[:, 0].tolist() == [good[0].target_tokens, 0, 0, good[1].target_tokens]
    errors = [e.decode() for e in answer.as_numpy("ERROR")[:, 0]]
    assert errors[0] == errors[3] == ""
    assert "byte 0xff at position 2" in errors[1]
    assert re.match(r"the text has \d+ tokens, the model takes 128", errors[2])


def test_a_served_translation_is_explained_by_likeness(server: TritonServer, client: ServedTranslator) -> None:
    done = CliRunner().invoke(main, ["explain", "fr", "Save the file.", "--json", "--url", server.urls.http])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    (found,) = record["explanations"]
    assert found["answer"] == client.translate(["Save the file."])[0].text
    assert (found["measure"], found["score"]) == ("similarity", 1.0)
    assert [word["text"] for word in found["words"]] == ["Save", "the", "file", "."]
    assert all(0 <= word["weight"] <= 1 for word in found["words"])
    assert any(word["weight"] > 0 for word in found["words"])


def test_our_client_reports_bad_rows_beside_good_ones(client: ServedTranslator, local: Translator) -> None:
    texts = [TEXTS[0], "x" * 1_000_001, "fox \ud800", LONG_LINE]
    rows = client.translate_rows(texts, long_input="refuse")
    assert [bool(row.error) for row in rows] == [False, True, False, True]
    assert_same([rows[0].translated, rows[2].translated], local.translate([texts[0], texts[2]]))
    assert all(row.translated.text == "" for row in rows if row.error)
    with pytest.raises(RequestError, match=r"text 1: the text has 1000001 characters"):
        client.translate(texts)
    with pytest.raises(RequestError, match=r"^the text has \d+ tokens"):
        client.translate([LONG_LINE], long_input="refuse")


def test_a_line_of_50000_characters_is_split_and_comes_back(client: ServedTranslator, local: Translator) -> None:
    few = search(local, {"max_new_tokens": 8})
    [served] = client.translate([LONG_LINE], few)
    assert_same([served], local.translate([LONG_LINE], few))
    assert served.source_tokens > 20_000


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"beam_size": 0}, "beam_size is 0: give a whole number from 1 to"),
        ({"beam_size": 10_000}, "beam_size is 10000"),
        ({"beam_size": True}, "beam_size is True"),
        ({"max_new_tokens": 128}, "max_new_tokens is 128: give a whole number from 1 to 127"),
        ({"max_new_tokens": 5, "min_new_tokens": 9}, "lower min_new_tokens"),
        ({"length_penalty": "much"}, "length_penalty is 'much'"),
        ({"length_penalty": "nan"}, "length_penalty is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"early_stopping": "maybe"}, "early_stopping is 'maybe'"),
        ({"long_input": "cut"}, "long_input is 'cut': give split or refuse"),
        ({"split": "words"}, "split is 'words': give sentence, paragraph, none"),
        ({"temperature": 1}, "unknown parameter temperature: known ones are num_beams, "),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(
    server: TritonServer, client: ServedTranslator, parameters: dict[str, Any], message: str
) -> None:
    status, answer = post(server, body(["fox"], parameters=parameters), "fr")
    assert (status, message in answer["error"]) == (400, True), answer
    assert "File " not in answer["error"]


@pytest.mark.parametrize("content", [body([]), body(["a"] * 65), body(["x" * 1_000_001])], ids=["none", "65", "bad"])
def test_a_request_without_a_good_row_is_refused(server: TritonServer, content: Any) -> None:
    assert post(server, content, "fr")[0] == 400
    assert post(server, body(["fox"]), "fr")[0] == 200


def test_a_request_joins_while_a_longer_one_is_decoded(server: TritonServer) -> None:
    order = []

    def ask(name: str, texts: list[str], parameters: dict[str, Any]) -> None:
        assert post(server, body(texts, parameters=parameters), "fr")[0] == 200
        order.append(name)

    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, "long", ["the fox jumps"] * 64, LONG)
        assert wait_until(lambda: busy(server), 10)
        short = pool.submit(ask, "short", ["fox"], {"max_new_tokens": 2})
        long.result()
        short.result()
    assert order == ["short", "long"]


def test_a_batch_at_a_time_gives_the_same_answers(server: TritonServer, local: Translator) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: post(server, body([text]), "by-batch"), TEXTS))
    assert_same([translated(answer)[0] for _, answer in answers], local.translate(TEXTS))


def test_a_cancelled_request_is_no_longer_decoded(server: TritonServer) -> None:
    import tritonclient.grpc as triton

    before = metric(server, "generated_tokens_total"), metric(server, "cancelled_requests_total")
    with triton.InferenceServerClient(server.urls.grpc) as client:
        call = client.async_infer("fr", [grpc_text(["the fox"] * 64, (64, 1))], lambda *_: None, parameters=LONG)
        assert wait_until(lambda: busy(server), 10)
        call.cancel()
        assert wait_until(lambda: metric(server, "cancelled_requests_total") == before[1] + 1, 10)
        assert wait_until(lambda: not busy(server), 10)
    assert metric(server, "generated_tokens_total") - before[0] < 64 * 127
    assert metric(server, "waiting_sequences") == 0


def test_a_client_that_disconnects_does_not_disturb_others(
    server: TritonServer, client: ServedTranslator, local: Translator
) -> None:
    host, port = server.urls.http.removeprefix("http://").split(":")
    content = json.dumps(body(["the fox"] * 64, parameters=LONG)).encode()
    head = f"POST /v2/models/fr/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    for sent in (head + content[:100], head + content):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert_same(client.translate(TEXTS[:4]), local.translate(TEXTS[:4]))


def test_a_full_queue_refuses_some_and_answers_the_others_right(server: TritonServer, local: Translator) -> None:
    texts = [f"open {i} files" for i in range(64)]
    expected = local.translate(texts)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda text: post(server, body([text]), "short-queue"), texts))
    assert {status for status, _ in answers} == {200, 503}
    for (status, answer), wanted in zip(answers, expected):
        if status == 503:
            assert "queue is full" in answer["error"]
        else:
            assert_same(translated(answer), [wanted])


def test_our_client_waits_for_a_full_queue(server: TritonServer, local: Translator) -> None:
    client = ServedTranslator("short-queue", server.urls.http, in_flight=16)
    client.max_batch_size = 1
    assert_same(client.translate(TEXTS), local.translate(TEXTS))
    client.max_batch_size = 64  # more sentences than the queue's limit, accepted if the queue is empty
    assert_same(client.translate(TEXTS), local.translate(TEXTS))
    client.close()


def test_a_served_model_is_opened_by_its_task(server: TritonServer) -> None:
    for name, kind in (("fr", ServedTranslator), ("tiny", ServedClassifier)):
        served = open_served(name, server.urls.http)
        assert type(served) is kind
        served.close()
    with pytest.raises(UsageError, match="fr translates"):
        ServedClassifier("fr", server.urls.http)
    with pytest.raises(UsageError, match="tiny classifies"):
        ServedTranslator("tiny", server.urls.http)
    with pytest.raises(UsageError, match="fr_stream answers gRPC streams only") as caught:
        open_served("fr_stream", server.urls.http)
    assert caught.value.remedy == "use the model fr"


def test_a_client_needs_no_engine() -> None:
    code = "import sys, deploykit.runtime.served; print({'onnxruntime', 'openvino', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Streams


def stream(
    server: TritonServer, text: str, parameters: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return a gRPC stream's responses to one document, a dictionary for each sentence. Raises the server's errors."""
    import tritonclient.grpc as triton

    answers: list[Any] = []
    done = threading.Event()

    def receive(result: Any, error: Any) -> None:
        answers.append(error or result)
        if error or result.as_numpy("FINAL")[0]:
            done.set()

    with triton.InferenceServerClient(server.urls.grpc) as client:
        client.start_stream(receive, headers=headers)
        client.async_stream_infer("fr_stream", [grpc_text([text], (1,))], parameters=parameters or {})
        assert done.wait(60)
        client.stop_stream()
    if isinstance(answers[-1], Exception):
        raise answers[-1]
    names = ("TRANSLATION", "INDEX", "FINAL", "SCORE", "SOURCE_TOKENS", "TARGET_TOKENS", "FINISH")
    return [{name: answer.as_numpy(name)[0] for name in names} for answer in answers]


def by_sentence(local: Translator, text: str, parameters: dict[str, Any]) -> tuple[str, list[int]]:
    """Translate a document in this process by sentences. Returns the text and the target tokens of each sentence."""
    [job] = local.begin([text], search(local, parameters), split="sentence")
    local.decoder.run(job.sentences)
    tokens = [len(sentence.result.tokens) for sentence in job.sentences if sentence.result is not None]
    return local.result(job).text, tokens


@pytest.mark.parametrize("parameters", [{}, {"beam_size": 2, "length_penalty": "0.7"}])
def test_the_sentences_of_a_document_come_in_order_and_joined_are_its_translation(
    server: TritonServer, local: Translator, parameters: dict[str, Any]
) -> None:
    answers = stream(server, DOCUMENT, parameters)
    text, tokens = by_sentence(local, DOCUMENT, parameters)
    assert b"".join(answer["TRANSLATION"] for answer in answers).decode() == text
    assert [answer["TARGET_TOKENS"] for answer in answers] == tokens
    assert [answer["INDEX"] for answer in answers] == list(range(len(tokens)))
    assert [answer["FINAL"] for answer in answers] == [False] * (len(tokens) - 1) + [True]
    assert len(tokens) > 40


def test_streams_at_once_do_not_mix(server: TritonServer, local: Translator) -> None:
    documents = [f"Open {i} files. " * (i + 1) + DOCUMENT for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        streams = list(pool.map(lambda text: stream(server, text), documents))
    for document, answers in zip(documents, streams):
        assert b"".join(a["TRANSLATION"] for a in answers).decode() == by_sentence(local, document, {})[0]


def test_a_document_is_streamed_over_http(server: TritonServer, local: Translator) -> None:
    request = json.dumps({"TEXT": DOCUMENT, "beam_size": 2}).encode()
    with urllib.request.urlopen(f"{server.urls.http}/v2/models/fr_stream/generate_stream", request) as answer:
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.strip()]
    assert "".join(event["TRANSLATION"] for event in events) == by_sentence(local, DOCUMENT, {"beam_size": 2})[0]
    assert [event["FINAL"] for event in events].index(True) == len(events) - 1


def test_an_unread_stream_requests_no_more_sentences(server: TritonServer) -> None:
    import tritonclient.grpc as triton

    before = metric(server, "generated_tokens_total")
    first = threading.Event()
    with triton.InferenceServerClient(server.urls.grpc) as client:
        client.start_stream(lambda result, error: first.set())
        few = {"min_new_tokens": 20, "max_new_tokens": 20}
        client.async_stream_infer("fr_stream", [grpc_text(["The fox. " * 2_000], (1,))], parameters=few)
        assert first.wait(30)
        client.stop_stream(cancel_requests=True)
    assert wait_until(lambda: not busy(server), 10)
    assert metric(server, "generated_tokens_total") - before < 2_000 * 20 / 2


@pytest.mark.parametrize("text", ["", " \n\t ", "\x00"])
def test_an_empty_document_has_one_empty_piece(server: TritonServer, text: str) -> None:
    [answer] = stream(server, text)
    assert (answer["TRANSLATION"], answer["INDEX"], answer["FINAL"]) == (b"", 0, True)


def test_a_stream_refuses_as_its_model_does(server: TritonServer) -> None:
    with pytest.raises(Exception, match="beam_size is 0: give a whole number"):
        stream(server, DOCUMENT, {"beam_size": 0})
    with pytest.raises(Exception, match="the text has 1000001 characters"):
        stream(server, "x" * 1_000_001)
    with pytest.raises(Exception, match="beam_size is 0: give a whole number"):  # it crashed Triton
        stream(server, DOCUMENT, {"beam_size": 0}, {"triton_grpc_error": "true"})
    assert stream(server, "The fox.")[-1]["FINAL"]


# Operators


@pytest.mark.parametrize("killed", ["model", "triton"])
def test_clients_of_a_killed_process_get_their_answers_from_the_next_one(
    own_repository: Path, local: Translator, killed: str
) -> None:
    with (
        start(own_repository) as server,
        supervised(server),
        contextlib.closing(ServedTranslator("fr", server.urls.http)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.translate, ["the fox"] * 64, search(local, LONG))
        assert wait_until(lambda: busy(server), 10)
        (stub_of(server, "fr") if killed == "model" else psutil.Process(server.pid)).send_signal(signal.SIGKILL)
        assert_same(answer.result(timeout=60), local.translate(["the fox"] * 64, search(local, LONG)))


def test_stop_finishes_running_translations(own_repository: Path) -> None:
    with start(own_repository) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, body(["the fox"] * 64, parameters=LONG), "fr")
        assert wait_until(lambda: busy(server), 10)
        server.stop()
        assert answer.result()[0] == 200


def test_stop_finishes_a_stream(own_repository: Path, local: Translator) -> None:
    with start(own_repository) as server, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(stream, server, DOCUMENT * 4)
        assert wait_until(lambda: busy(server), 10)
        server.stop()
        text = b"".join(answer["TRANSLATION"] for answer in answers.result()).decode()
    assert text == by_sentence(local, DOCUMENT * 4, {})[0]


def test_an_engine_failure_is_an_error_and_the_next_request_is_answered(
    own_repository: Path, local: Translator
) -> None:
    version = own_repository / "fr" / "1"
    vocabulary = json.loads((version / "vocab.json").read_text())
    vocabulary["q"] = 1_000_000  # an id without embedding
    (version / "vocab.json").write_text(json.dumps(vocabulary))
    manifest = load_manifest(version, verify=False)
    write_manifest(version, "model", manifest.task, inputs="", options=manifest.options)
    with start(own_repository) as server:
        for _ in range(2):
            status, answer = post(server, body(["qqqq"]), "fr")
            assert (status, answer["error"]) == (500, "the model failed on this request: InvalidArgument")
            status, answer = post(server, body(["the fox"]), "fr")
            assert status == 200
            assert_same(translated(answer), local.translate(["the fox"]))


@pytest.mark.parametrize(("family", "precision"), [("m2m_100", "fp32"), ("t5", "fp32"), ("marian", "int8")])
def test_every_family_and_precision_is_served(
    make_tiny_translation: Callable[..., Path], tmp_path: Path, family: str, precision: str
) -> None:
    export = make_tiny_translation(tmp_path / "export", family, precision)
    package(export, "fr", tmp_path / "repository", stream=False)
    expected = open_graph(export, load_manifest(export))
    assert isinstance(expected, Translator)
    with start(tmp_path / "repository") as server:
        client = ServedTranslator("fr", server.urls.http)
        assert_same(client.translate(TEXTS), expected.translate(TEXTS))
        client.close()


# Packaging


def test_a_package_holds_graphs_and_tokenizer_and_a_stream_beside_it(
    own_repository: Path, tiny_translation: Path
) -> None:
    again = package(tiny_translation, "fr", own_repository, settings=ServingSettings(threads=1))
    assert (again.version, again.reused, again.config_kept) == (1, True, True)
    assert set(again.manifest.files) == set(load_manifest(tiny_translation).files)
    assert again.manifest.options == {"engine": "onnxruntime", "precision": "fp32", "name": "fr"}
    assert [(model.name, model.versions) for model in list_models(own_repository)] == [
        ("fr", (1,)),
        ("fr_stream", (1,)),
    ]
    streaming = load_manifest(own_repository / "fr_stream" / "1", "model")
    assert (dict(streaming.files), streaming.options) == ({}, {"name": "fr_stream", "streams": "fr"})


def test_settings_appear_in_the_config(tiny_translation: Path, tmp_path: Path) -> None:
    settings = ServingSettings(
        8,
        threads=3,
        max_queue_size=7,
        max_rows=16,
        max_cache_mb=100,
        long_input="refuse",
        split="none",
        in_flight=False,
    )
    package(tiny_translation, "fr", tmp_path, settings=settings, stream=False)
    config = read_config(tmp_path / "fr" / "config.pbtxt")
    assert (config.max_batch_size, config.instance_group[0].count) == (8, 1)
    names = ("threads", "max_queue", "max_rows", "max_cache_mb", "long_input", "split", "in_flight")
    assert [config.parameters[n].string_value for n in names] == ["3", "7", "16", "100", "refuse", "none", "0"]
    assert not (tmp_path / "fr_stream").exists()
    words = ["package", str(tiny_translation), "--name", "typed", "--model-repository", str(tmp_path), "--no-stream"]
    for option, expected in (("--no-in-flight", "0"), ("--in-flight", "1")):
        done = CliRunner().invoke(main, [*words, option, "--overwrite-config"])
        assert done.exit_code == 0, done.stderr
        assert read_config(tmp_path / "typed" / "config.pbtxt").parameters["in_flight"].string_value == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_input": "cut"}, "long_input is 'cut'"),
        ({"split": "words"}, "split is 'words'"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"token_budget": 99}, "token_budget is a setting of classification"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_name(
    tiny_translation: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        package(tiny_translation, "fr", tmp_path, settings=ServingSettings(**settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("fr", 'name: "SCORE" data_type: TYPE_FP32', 'name: "SCORE" data_type: TYPE_FP64', "output SCORE is TYPE_FP64"),
        ("fr", '"target": "fr"', '"target": "de"', 'parameter task has target "de", the model "fr"'),
        ("fr", "max_batch_size: 64", "max_batch_size: 0", "max_batch_size is 0"),
        ("fr_stream", "decoupled: true", "decoupled: false", "model_transaction_policy"),
        (
            "fr_stream",
            '{ string_value: "fr" }',
            '{ string_value: "de" }',
            'parameter streams is .*, it must stream "fr"',
        ),
        ("fr_stream", "max_batch_size: 0", "max_batch_size: 8", "max_batch_size is 8"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field(
    own_repository: Path, tiny_translation: Path, model: str, old: str, new: str, message: str
) -> None:
    config = own_repository / model / "config.pbtxt"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match=message):
        package(tiny_translation, "fr", own_repository)
    with pytest.raises(ArtifactError, match=message):
        start(own_repository).start()


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("max_rows", "many", "parameter max_rows is 'many'"),
        ("max_rows", "0", "parameter max_rows is '0'"),
        ("long_input", "cut", "parameter long_input is 'cut'"),
    ],
)
def test_a_wrong_parameter_in_the_config_stops_the_start(
    own_repository: Path, parameter: str, value: str, message: str
) -> None:
    shutil.rmtree(own_repository / "fr_stream")
    config = own_repository / "fr" / "config.pbtxt"
    pattern = rf'(key: "{parameter}" value {{ string_value: )"[^"]*"'
    config.write_text(re.sub(pattern, rf'\g<1>"{value}"', config.read_text()))
    with pytest.raises(ServerError, match=re.escape(message)) as caught:
        start(own_repository).start()
    assert caught.value.remedy
