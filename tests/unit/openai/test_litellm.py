"""LiteLLM, which asks the server as an OpenAI-compatible one."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import litellm
from pydantic import BaseModel
base, model = sys.argv[1:]
at = dict(api_base=base, api_key="none")
ask = dict(model=f"openai/{model}", **at, temperature=0, max_tokens=20,
           messages=[{"role": "user", "content": "What is the capital of France?"}])
whole = litellm.completion(**ask)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
say = dict(model=f"text-completion-openai/{model}", **at, prompt="Say", max_tokens=4, temperature=0)
completed = litellm.text_completion(**say)
class Answer(BaseModel):
    yes: bool
formatted = litellm.completion(**{**ask, "max_tokens": 1000}, response_format=Answer).choices[0].message.content
weather = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}}}
call = dict(**{**ask, "max_tokens": 1000}, tools=[weather], tool_choice="required")
def error_of(kind, ask):
    try:
        ask()
    except kind as fault:
        return str(fault)
try:
    called = litellm.completion(**call).choices[0].message.tool_calls[0].function
    called = [called.name, json.loads(called.arguments)]
    deltas = [chunk.choices[0].delta for chunk in litellm.completion(**call, stream=True)]
    parts = [part.function for delta in deltas for part in delta.tool_calls or ()]
    streamed = ["".join(part.name or "" for part in parts), json.loads("".join(part.arguments for part in parts))]
except litellm.BadRequestError as fault:  # a model whose template has no place for tools
    called = streamed = str(fault)
print(json.dumps([
    whole.choices[0].message.content, "".join(pieces), whole.usage.completion_tokens, completed.choices[0].text,
    [chunk.choices[0].text or "" for chunk in litellm.text_completion(**say, stream=True)],
    json.loads(formatted), called, streamed,
    error_of(litellm.BadRequestError, lambda: litellm.completion(**{**ask, "temperature": -1})),
    error_of(litellm.NotFoundError, lambda: litellm.embedding(model=f"openai/{model}", input=["a"], **at))]), flush=True)
os._exit(0)  # litellm's threads once crashed the interpreter as it ended
"""


def test_litellm_gets_the_same_answers(base_url: str, model: str) -> None:
    # In a process of its own: litellm changes settings of the modules that it shares with the tests.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, base_url, model], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    whole, streamed, tokens, completed, pieces, formatted, called, called_streamed, error, embedded = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert whole
    assert streamed == whole
    assert 0 < tokens <= 20
    assert completed
    assert "".join(pieces) == completed
    assert list(formatted) == ["yes"]
    assert called == called_streamed
    assert (
        called in (["weather", {"city": "Oslo"}], ["weather", {"city": "Rome"}])
        or "template does not write them" in called
    )
    assert "temperature: the value should be greater than or equal to 0" in error
    assert "POST /v1/embeddings: Not Found; the routes here are" in embedded
