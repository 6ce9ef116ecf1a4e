"""Answer with a language model on a running server, through the same interface as in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deploykit.errors import DataError, RequestError, ServerError, UsageError
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.served import DEFAULT_URL, ServedModel
from deploykit.tasks.registry import task_of
from deploykit.tasks.text_generation.decoder import Finish
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import Generated, Prompt

_WANTED = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length"}


class ServedGenerator(ServedModel):
    """The language model ``name`` on the Triton server at ``url``; satisfies ``TextGenerator``.

    Takes the options of ``ServedModel``; the default timeout (seconds) is longer. Requests are sent ``in_flight`` at a
    time; the server decodes them together.
    """

    def __init__(
        self, name: str, url: str = DEFAULT_URL, *, timeout: float = 600.0, in_flight: int = 32, **options: Any
    ) -> None:
        super().__init__(name, url, timeout=timeout, in_flight=in_flight, **options)
        if not isinstance(self.facts, TextGeneration):
            self.close()
            raise UsageError(f"{name} {task_of(self.facts).does}, it does not generate text", "use deploykit predict")
        self.task: TextGeneration = self.facts

    @property
    def has_template(self) -> bool:
        return self.task.chat

    def reply(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Generated] | DataError]:
        sampling = sampling or self.task.sampling

        def ask(prompt: Prompt) -> list[Generated] | DataError:
            try:
                return _generated(
                    self._request("POST", "generate", self._body(prompt, sampling), patience=self._patience)
                )
            except RequestError as error:
                if error.status != 400:
                    raise
                return DataError(error.message, "correct the prompt")

        answers = []
        for answer in self._pool.map(ask, prompts):
            answers.append(answer)
            progress(sampling.n)
        return answers

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield the pieces of one answer as they arrive. Raises DataError for a prompt that is refused."""
        body = self._body(prompt, sampling or self.task.sampling, stream=True)
        try:
            finish = ""
            for event in self._events("generate_stream", body):
                finish = event["finish_reason"]
                yield event["text_output"]
        except RequestError as error:
            if error.status != 400:
                raise
            raise DataError(error.message, "correct the prompt") from None
        if not finish:
            raise ServerError(
                f"the server at {self._url} ended the stream before the answer's end", "see its log, or try again"
            )

    def answer_logprobs(self, prompts: Sequence[Prompt], answer: Sequence[int]) -> list[float]:
        """Return the log-probability of an answer's tokens after each prompt; see ``TextGenerator``. The server echoes the
        prompt's tokens, and then scores them with those of the answer."""

        def score(prompt: Prompt) -> float:
            sent = {"text_input": prompt} if isinstance(prompt, str) else {"messages": _json(prompt)}
            ids = [token["token_id"] for token in self._echo(sent)] if prompt else list(self.task.eos_token_ids[:1])
            return math.fsum(token["logprob"] for token in self._echo({"input_ids": [*ids, *answer]})[len(ids) :])

        return list(self._pool.map(score, prompts))

    def _echo(self, prompt: Mapping[str, Any]) -> list[Any]:
        """Return the log-probabilities of a prompt's tokens."""
        wanted = {"return_logprobs": True, "sampling_parameters": _json({"echo": True, "max_new_tokens": 0})}
        answer = self._request(
            "POST", "generate", _json({**prompt, **wanted}).encode(errors="replace"), patience=self._patience
        )
        return list(json.loads(_listed(answer["logprobs"])[0]))

    def _body(self, prompt: Prompt, sampling: Sampling, *, stream: bool = False) -> bytes:
        record: dict[str, Any] = {
            "sampling_parameters": _json(sampling.parameters(self.task.sampling)),
            "exclude_input_in_output": True,
            "stream": stream,
            **dict.fromkeys(_WANTED, True),
        }
        if sampling.logprobs is not None:
            record["return_logprobs"] = True
        if isinstance(prompt, str):
            record["text_input"] = prompt
        else:
            record["messages"] = _json(prompt)
        return _json(record).encode(errors="replace")


def _generated(answer: Any) -> list[Generated]:
    texts, finishes, counts = (_listed(answer[name]) for name in ("text_output", "finish_reason", "num_output_tokens"))
    logprobs = [json.loads(row) for row in _listed(answer.get("logprobs", ["[]"] * len(texts)))]
    return [
        Generated(
            text,
            _FINISHES[finish],
            int(answer["num_input_tokens"]),
            int(tokens),
            tuple(found["token_id"] for found in row),
            tuple(row),
        )
        for text, finish, tokens, row in zip(texts, finishes, counts, logprobs)
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
