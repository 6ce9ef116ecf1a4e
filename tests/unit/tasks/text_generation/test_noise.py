"""Copies of rows with noise in their prompts."""

from __future__ import annotations

import numpy as np
import pytest
from language_models import tokenizer

from deploykit.data.noise import NOISES, noisy_copies
from deploykit.errors import UsageError
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import chat_tokenizer
from deploykit.tasks.text_generation.noise import noisy_prompt
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.rows import Row

ROW = Row(
    (
        {"role": "system", "content": "Answer with a command."},
        {"role": "user", "content": "list the file here,\n\nnot the folder!"},
        {"role": "assistant", "content": "ls -f ."},
        {"role": "user", "content": "and the log at home, please"},
        {"role": "assistant", "content": "ls -l ~"},
    ),
    origin="a.jsonl:7",
)


@pytest.mark.parametrize("name", NOISES)
def test_only_what_the_user_writes_changes(name: str) -> None:
    [copy] = noisy_copies([ROW], (f"{name}=0.5",), 3, noisy_prompt)[f"{name}=0.5"]
    assert copy.origin == f"a.jsonl:7 with {name}"
    changed = [message["role"] for message, own in zip(copy.messages, ROW.messages) if message != own]
    assert set(changed) == {"user"}
    chat = chat_tokenizer(tokenizer(CHATML), (4,))
    learned = [row.ids[row.supervised].tolist() for row in map(chat.encode_row, (ROW, copy))]
    assert learned[0] == learned[1], "the same answers are learned"
    assert not np.array_equal(chat.encode_row(ROW).ids, chat.encode_row(copy).ids)


def test_a_plain_text_has_no_copy() -> None:
    assert noisy_copies([Row(text="some text to learn")], ("typos=1",), 0, noisy_prompt) == {"typos=1": []}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"augment": ("typos=0.1",), "loss_on": "all"}, "the model would learn to write them"),
        ({"augment": ("mask=0.1",)}, "--augment mask=0.1 is for classification"),
        ({"augment": ("typos",)}, "is not a noise with a rate"),
    ],
)
def test_noise_that_would_be_learned_or_is_unknown_is_refused(words: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TextGenerationOptions(model="m", train="a.jsonl", **words).check()  # type: ignore[arg-type]
