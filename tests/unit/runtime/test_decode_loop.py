"""The decode loop for Triton: joining, refusal, cancellation and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from deploykit.artifacts import load_manifest
from deploykit.errors import QueueFullError
from deploykit.runtime.decode_loop import DecodeLoop, Load
from deploykit.runtime.decoding import longest_first
from deploykit.runtime.generation import override
from deploykit.tasks.opening import open_graph
from deploykit.tasks.translation.predictor import Job, Translator
from deploykit.tasks.translation.translated import Translated

LONG: dict[str, Any] = {"min_new_tokens": 127}
Client = TypeVar("Client", bound="FakeClient")
SHORT: dict[str, Any] = {"max_new_tokens": 2}


class FakeClient:
    """A client that keeps its answer. ``answered`` lists all clients in the order of their answers."""

    def __init__(self, answered: list[FakeClient], translator: Translator, jobs: Sequence[Job]) -> None:
        self.translator, self.jobs = translator, jobs
        self.cancelled = False
        self.answers: Sequence[Translated] | None = None
        self.error: Exception | None = None
        self.done = threading.Event()
        self._answered = answered

    def is_cancelled(self) -> bool:
        return self.cancelled

    def answer(self) -> None:
        self.answers = [self.translator.result(job) for job in self.jobs]
        self._end()

    def fail(self, error: Exception | None) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self._answered.append(self)
        self.done.set()


class Gated:
    """A loop whose decoder makes only as many steps as the test allows."""

    def __init__(self, export: Path, *, max_rows: int = 4, **options: Any) -> None:
        self.answered: list[FakeClient] = []
        self.loads: list[Load] = []
        self.errors: list[Exception] = []
        self.broken = 0  # number of steps that should fail
        self._steps = threading.Semaphore(0)
        self._open = False
        self._export, self._max_rows = export, max_rows
        settings = {"max_queue": 1000, "report": self.loads.append, "log_error": self.errors.append, **options}
        self.loop = DecodeLoop(self._load, **settings)

    def _load(self) -> Translator:
        translator = open_graph(self._export, load_manifest(self._export), threads=1)
        assert isinstance(translator, Translator)
        translator.decoder.max_rows = self._max_rows
        step = translator.decoder.step

        def gated() -> Any:
            if not self._open:
                self._steps.acquire()
            if self.broken:
                self.broken -= 1
                raise RuntimeError("out of order")
            return step()

        translator.decoder.step = gated  # type: ignore[method-assign]
        return translator

    def submit(self, texts: Sequence[str], parameters: dict[str, Any]) -> FakeClient:
        return self.submit_as(FakeClient, self.begin(texts, parameters))

    def begin(self, texts: Sequence[str], parameters: dict[str, Any]) -> list[Job]:
        translator = self.loop.model
        return translator.begin(texts, override(translator.task, parameters))

    def submit_as(self, kind: Callable[..., Client], jobs: Sequence[Job]) -> Client:
        caller = kind(self.answered, self.loop.model, jobs)
        self.loop.submit(caller, longest_first(sentence for job in jobs for sentence in job.sentences))
        return caller

    def steps(self, count: int) -> None:
        """Allow ``count`` steps, and return when the loop waits for the next."""
        for _ in range(count):
            self._steps.release()
        while self._steps._value:  # type: ignore[attr-defined]
            time.sleep(0.001)
        time.sleep(0.02)

    def open(self) -> None:
        self._open = True
        self._steps.release()


@contextmanager
def opened(gated: Gated) -> Iterator[Gated]:
    try:
        yield gated
    finally:
        gated.open()
        gated.loop.close()


@pytest.mark.parametrize(("in_flight", "first"), [(True, "short"), (False, "long")])
def test_a_text_joins_at_the_next_step_or_waits_for_the_whole_batch(
    tiny_translation: Path, in_flight: bool, first: str
) -> None:
    with opened(Gated(tiny_translation, max_rows=16, in_flight=in_flight)) as gated:
        long = gated.submit(["the fox"] * 2, LONG)
        gated.steps(5)
        short = gated.submit(["fox"], SHORT)
        gated.open()
        assert long.done.wait(30)
        assert short.done.wait(30)
    assert gated.answered == ([short, long] if first == "short" else [long, short])


def test_a_document_does_not_delay_a_later_line(tiny_translation: Path) -> None:
    with opened(Gated(tiny_translation)) as gated:
        document = gated.submit(["the fox"] * 40, {"max_new_tokens": 12, "min_new_tokens": 12})
        gated.steps(3)
        lines = [gated.submit(["fox"], SHORT) for _ in range(3)]
        gated.open()
        assert document.done.wait(30)
    assert gated.answered == [*lines, document]


def test_requests_beyond_the_queue_limit_are_refused_and_waiting_ones_answered(tiny_translation: Path) -> None:
    with opened(Gated(tiny_translation, max_queue=6)) as gated:
        first = gated.submit(["the fox"] * 9, SHORT)  # nothing waits: more than the queue takes is taken
        gated.steps(1)
        with pytest.raises(QueueFullError):
            gated.submit(["fox"] * 2, SHORT)
        second = gated.submit(["fox"], SHORT)
        with pytest.raises(QueueFullError):
            gated.submit(["fox"], SHORT)
        gated.open()
        assert first.done.wait(30)
        assert second.done.wait(30)
        assert gated.submit(["fox"], SHORT).done.wait(30)
    assert [len(caller.answers or ()) for caller in (first, second)] == [9, 1]
    assert gated.loads[-1].waiting == gated.loads[-1].running == 0


def test_cancelled_requests_are_no_longer_decoded(tiny_translation: Path) -> None:
    with opened(Gated(tiny_translation)) as gated:
        leaver = gated.submit(["the fox"] * 10, LONG)
        stayer = gated.submit(["fox"], SHORT)
        gated.steps(4)
        leaver.cancelled = True
        gated.open()
        assert leaver.done.wait(10)
        assert stayer.done.wait(10)
        decoder = gated.loop.model.decoder
    assert (leaver.answers, leaver.error) == (None, None)
    assert len(stayer.answers or ()) == 1
    assert decoder.running == []
    assert (gated.loads[-1].cancelled, gated.loads[-1].waiting) == (1, 0)
    assert gated.loads[-1].tokens < 10 * 127


def test_a_failed_step_fails_its_own_requests_only(tiny_translation: Path) -> None:
    with opened(Gated(tiny_translation)) as gated:
        running = gated.submit(["the fox"] * 4, LONG)
        gated.steps(2)
        waiting = gated.submit(["fox"] * 2, SHORT)
        gated.broken = 1
        gated.open()
        assert waiting.done.wait(30)
    assert str(running.error) == "out of order"
    assert len(waiting.answers or ()) == 2
    assert [str(error) for error in gated.errors] == ["out of order"]


class Unreachable(FakeClient):
    def answer(self) -> None:
        raise ConnectionError("nobody there")

    def fail(self, error: Exception | None) -> None:
        super().fail(error)
        raise ConnectionError("nobody there either")


def test_a_client_that_cannot_be_answered_does_not_stop_the_loop(tiny_translation: Path) -> None:
    with opened(Gated(tiny_translation)) as gated:
        gated.open()
        caller = gated.submit_as(Unreachable, gated.begin(["fox"], {}))
        assert gated.submit(["fox"], SHORT).done.wait(30)
        assert caller.done.wait(30)
    assert str(caller.error) == "nobody there"


class Slow(FakeClient):
    taking = threading.Event()

    def answer(self) -> None:
        self.taking.wait(30)
        super().answer()


def test_a_client_slow_to_take_its_answer_delays_no_step(tiny_translation: Path) -> None:
    with opened(Gated(tiny_translation)) as gated:
        gated.open()
        slow = gated.submit_as(Slow, gated.begin(["fox"], SHORT))
        (job,) = gated.begin(["the fox"], LONG)
        other = gated.submit_as(FakeClient, [job])
        deadline = time.monotonic() + 30
        while not job.done and time.monotonic() < deadline:
            time.sleep(0.001)
        assert job.done
        assert not slow.done.is_set()
        Slow.taking.set()
        assert other.done.wait(30)
    assert gated.answered == [slow, other]


def test_closing_answers_what_was_submitted(tiny_translation: Path) -> None:
    gated = Gated(tiny_translation)
    callers = [gated.submit(texts, SHORT) for texts in (["fox"] * 9, [""], [], ["the fox"])]
    gated.open()
    gated.loop.close()
    assert [len(caller.answers or ()) for caller in callers] == [9, 1, 0, 1]


def test_answers_equal_those_of_the_translator(make_tiny_translation: Callable[..., Path], tmp_path: Path) -> None:
    export = make_tiny_translation(tmp_path / "export", "m2m_100")
    texts = [f"open {i} files" for i in range(12)]
    with opened(Gated(export)) as gated:
        gated.open()
        callers = [gated.submit([text], {"beam_size": 1 + i % 3}) for i, text in enumerate(texts)]
        assert all(caller.done.wait(30) for caller in callers)
        translator = open_graph(export, load_manifest(export), threads=1)
        assert isinstance(translator, Translator)
    for i, (text, caller) in enumerate(zip(texts, callers)):
        [expected] = translator.translate([text], override(translator.task, {"beam_size": 1 + i % 3}))
        assert caller.answers is not None
        assert caller.answers[0].text == expected.text
        assert caller.answers[0].score == pytest.approx(expected.score, abs=1e-5)
