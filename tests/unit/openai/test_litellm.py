"""LiteLLM, which asks the server as an OpenAI-compatible one."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import litellm
base, model = sys.argv[1:]
ask = dict(model=f"openai/{model}", api_base=base, api_key="none", temperature=0, max_tokens=20,
           messages=[{"role": "user", "content": "What is the capital of France?"}])
whole = litellm.completion(**ask)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
completed = litellm.text_completion(model=f"text-completion-openai/{model}", api_base=base, api_key="none", prompt="Say",
                                    max_tokens=4)
try:
    litellm.completion(**{**ask, "temperature": -1})
    error = ""
except litellm.BadRequestError as fault:
    error = str(fault)
print(json.dumps([whole.choices[0].message.content, "".join(pieces), whole.usage.completion_tokens,
                  completed.choices[0].text, error]))
"""


def test_litellm_gets_the_same_answers(base_url: str, model: str) -> None:
    # In a process of its own: litellm changes settings of the modules that it shares with the tests.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, base_url, model], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    whole, streamed, tokens, completed, error = json.loads(done.stdout.splitlines()[-1])
    assert whole
    assert streamed == whole
    assert 0 < tokens <= 20
    assert completed
    assert "temperature: the value should be greater than or equal to 0" in error
