"""Detokenizing as tokens come: the pieces are the text of all tokens, cut at the earliest stop string."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deploykit.runtime.stop_search import StopSearch
from deploykit.runtime.stream_text import StreamText, TokenDecoder

WORDS = ["a", "b", "ab", "bc", "c", ".", " n't", "日本", "語", "é", "�", "1"]
BYTES = [f"<0x{byte:02X}>" for byte in (0x41, 0x42, 0x80, 0xC3, 0xA9, 0xE3, 0x81, 0x82, 0xF0, 0x9F, 0x98, 0x80, 0xFF)]


@cache
def decoder(name: str) -> TokenDecoder:
    if name == "byte-level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = ["ab", "bc", "Ġa", "ãģ", "Ĥã", "ðŁ", "ĺĢ", "Ãł"]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *pairs])}, []))
        tokenizer.decoder = decoders.ByteLevel()
    elif name == "wordpiece":
        words = [*WORDS, *(f"##{word}" for word in WORDS), "'", "do", "##.", "", "[UNK]"]
        tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    else:
        words = ["", *WORDS, *(f"▁{word}" for word in WORDS), "▁", "▁▁", *BYTES]
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        replace, fallback, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
        strip = decoders.Strip(" ", 1, 0)
        tokenizer.decoder = {
            "metaspace": decoders.Metaspace(),
            "metaspace, byte fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
            "llama": decoders.Sequence([replace, fallback, fuse, strip]),
            "gemma": decoders.Sequence([replace, fallback, fuse]),
            "replaces in the whole": decoders.Sequence([replace, fallback, fuse, decoders.Replace("ca", "a")]),
            "ctc": decoders.CTC("b", "▁"),
            "none": None,
        }[name]
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken("<tool> é", special=False)])
    return TokenDecoder(tokenizer)


KINDS = {
    "byte-level": "bytes", "wordpiece": "tokens", "metaspace": "tokens", "metaspace, byte fallback": "tokens",
    "llama": "tokens", "gemma": "tokens", "none": "tokens", "replaces in the whole": "whole", "ctc": "whole",
}  # fmt: skip


def cut(text: str, stop: list[str]) -> str:
    return text[: min((text.index(part) for part in stop if part in text), default=None)]


PARTS = st.text("ab c.日�é", min_size=1, max_size=4)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_are_the_text_up_to_the_earliest_stop(name: str, data: st.DataObject) -> None:
    decode = decoder(name)
    assert decode.kind == KINDS[name]
    size = decode.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 1), max_size=25))  # one id that the vocabulary lacks
    text = decode(ids)
    begin = data.draw(st.integers(0, len(text)))
    of_text = [part for part in (text[begin : begin + 3],) if part]
    stop = data.draw(st.lists(st.one_of(PARTS, *map(st.just, of_text)), max_size=4))
    stream = StreamText(decode, stop)
    pieces: list[str] = []
    used = 0
    for token_id in ids:
        pieces.append(stream.add(token_id))
        used += 1
        if stream.stopped:
            break
    pieces.append(stream.finish())
    whole = decode(ids[:used])
    assert "".join(pieces) == cut(whole, stop)
    assert stream.stopped == any(part in whole for part in stop)
    if KINDS[name] != "whole":  # what comes later does not move the cut
        assert "".join(pieces) == cut(text, stop)


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=6), st.data())
def test_the_cut_does_not_depend_on_the_split(text: str, stop: list[str], data: st.DataObject) -> None:
    search = StopSearch(stop)
    given_out, rest = "", text
    while rest and not search.stopped:
        size = data.draw(st.integers(1, len(rest)))
        given_out += search.add(rest[:size])
        rest = rest[size:]
        assert text.startswith(given_out)
    given_out += search.finish()
    assert given_out == cut(text, stop)


def test_a_suspected_stop_string_is_held_back_and_not_lost() -> None:
    decode = decoder("byte-level")
    ids = {token: decode.tokenizer.token_to_id(token) for token in ("a", "b", "c", "ãģ", "Ĥ")}
    stream = StreamText(decode, ["abc"])
    assert [stream.add(ids[token]) for token in ("a", "b", "a", "b")] == ["", "", "ab", ""]
    assert stream.finish() == "ab"
    stream = StreamText(decode)
    assert [stream.add(ids["ãģ"]), stream.add(ids["Ĥ"])] == ["", "あ"]
    stream = StreamText(decode, ["abc", "b"])
    assert [stream.add(ids["a"]), stream.add(ids["b"])] == ["", ""]
    assert not stream.stopped, "abc began before b, and may still come"
    assert stream.finish() == "a"
    assert stream.stopped


@pytest.mark.parametrize("name", ["byte-level", "gemma", "replaces in the whole"])
def test_stop_strings_within_the_first_tokens_are_ignored(name: str) -> None:
    decode = decoder(name)
    a, b = (decode.tokenizer.token_to_id(token) for token in "ab")
    stream = StreamText(decode, ["ab"], min_tokens=2)
    pieces = [stream.add(token) for token in (a, b, a, b, a)]
    assert "".join(pieces) + stream.finish() == "ab"
    assert stream.stopped
    stream = StreamText(decode, ["ab"], min_tokens=2)
    assert stream.add(a) + stream.add(b) + stream.finish() == "ab"
    assert not stream.stopped


def test_a_token_costs_the_same_late_in_an_answer() -> None:
    decode = decoder("llama")
    seen: list[int] = []

    class Counting(TokenDecoder):
        def __call__(self, ids: list[int]) -> str:  # type: ignore[override]
            seen.append(len(ids))
            return super().__call__(ids)

    counting = Counting(decode.tokenizer)
    stream = StreamText(counting, ["never"])
    a = decode.tokenizer.token_to_id("▁a")
    for _ in range(500):
        stream.add(a)
    assert max(seen) == 2
