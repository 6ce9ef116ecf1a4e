"""Log probabilities of completions: places in the text, and names of tokens that are parts of a character."""

from __future__ import annotations

from typing import Any

from deploykit.openai.logprobs import CompletionLogprobs


def record(data: bytes, logprob: float = -1.0, top: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob, "top": top}


def test_offsets_are_places_in_the_text_though_characters_are_cut_into_tokens() -> None:
    text = "a😀é!"
    pieces = [b"a", b"\xf0\x9f", b"\x98", b"\x80\xc3", b"\xa9", b"!"]
    logprobs = CompletionLogprobs()
    parts = [logprobs.add([record(piece) for piece in some]) for some in (pieces[:2], pieces[2:])]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert offsets == [0, 1, 1, 1, 2, 3]
    assert text[offsets[-1]] == "!"


def test_candidates_that_are_parts_of_characters_are_kept_apart() -> None:
    top = (record(b"\xf0\x9f", -0.1), record(b"\xc3", -2.0), record(b"x", -3.0), record(b"x", -4.0))
    [found] = CompletionLogprobs().add([record(b"\xc3", -2.0, top)])["top_logprobs"]
    assert found == {"bytes:\\xf0\\x9f": -0.1, "bytes:\\xc3": -2.0, "x": -3.0}
