"""Structured output: answers of a random model fit what they are constrained to."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from language_models import random_model, tokenizer
from tokenizers import Tokenizer, decoders, models

from deploykit.errors import MissingDependencyError, UsageError
from deploykit.runtime.sampling import Sampling, override
from deploykit.tasks.text_generation import grammar
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, checkpoint_facts
from deploykit.tasks.text_generation.generator import Generated
from deploykit.tasks.text_generation.grammar import Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["a", "日本"]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "counts"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " "},  # a random model writes much white space
}
CHOICES = ["はい", "いいえ", "😀", "👩‍👩‍👧", "a", "ab", 'say "no"\\\n', "\x7f\0\u2028"]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


@cache
def generator() -> TorchGenerator:
    model, own = random_model("llama"), tokenizer()
    return TorchGenerator(model, own, checkpoint_facts(model.config, model.generation_config, own))


def answers(given: dict[str, Any], seeds: int = 50) -> list[Generated]:
    sampling = override(Sampling(temperature=1.0, max_new_tokens=120, n=seeds), given)
    [found] = generator().generate([[7, 8, 9]], sampling)
    whole = [answer for answer in found if answer.finish != "length"]
    assert len(whole) > seeds / 2
    return whole


@pytest.mark.parametrize("left_out", ["", "additionalProperties"])
def test_answers_fit_a_json_schema(left_out: str) -> None:
    for answer in answers({"json_schema": {key: value for key, value in SCHEMA.items() if key != left_out}}):
        value = json.loads(answer.text)
        assert set(value) == {"name", "kind", "counts"}
        assert value["kind"] in ("a", "日本")
        assert len(value["counts"]) <= 3
        assert all(isinstance(count, int) and 0 <= count <= 99 for count in value["counts"])
        assert answer.finish == "stop"


def test_answers_match_a_regex() -> None:
    pattern = r"(GET|POST) /[a-z]{1,5}(\?[a-z]=[0-9é]{1,3})?"
    for answer in answers({"regex": pattern}):
        assert re.fullmatch(pattern, answer.text), answer.text


def test_answers_are_one_of_the_choices() -> None:
    found = {answer.text for answer in answers({"choice": CHOICES})}
    assert found <= set(CHOICES)
    assert len(found) > 2


def test_answers_match_a_lark_grammar() -> None:
    for answer in answers({"grammar": 'start: term ("+" term)?\nterm: /[0-9]{1,3}/ | "(" start ")"'}, 20):
        assert re.fullmatch(r"[0-9+()]+", answer.text)
        assert answer.text.count("(") == answer.text.count(")")


@pytest.mark.parametrize(("schema", "kind"), [(True, dict), ({}, object)])
def test_any_json(schema: Any, kind: type) -> None:
    sampling = override(Sampling(temperature=1.0, max_new_tokens=200, n=20), {"json_schema": schema})
    [found] = generator().generate([[7]], sampling)
    whole = [json.loads(answer.text) for answer in found if answer.finish != "length"]
    assert whole
    assert all(isinstance(value, kind) for value in whole)


def test_a_constrained_answer_is_the_same_in_any_company() -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=40, json_schema=SCHEMA, seed=3)
    together = generator().generate([[7, 8], [9], [10, 11, 12]], sampling)
    assert together[1][0].ids == generator().generate([[9]], sampling)[0][0].ids


def test_what_other_rules_ask_does_not_break_the_answer() -> None:
    for given in (
        {"min_new_tokens": 60}, {"ignore_eos": True}, {"logit_bias": {2: 100}}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0},
    ):  # fmt: skip
        for answer in answers({"choice": CHOICES, **given}, 4):
            assert answer.text in CHOICES


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema cannot be used: Unsatisfiable"),
        ({"json_schema": {"not": {"type": "string"}}}, r"json_schema cannot be used: Unimplemented keys: \[\"not\"\]"),
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be used: Invalid type: strin"),
        ({"regex": "(a"}, "regex cannot be used: .*unclosed group"),
        ({"regex": "a(?=b)"}, "look-ahead"),
        ({"regex": r"[^\s\S]"}, "regex cannot be used: no text"),
        ({"regex": "\ud800"}, "regex cannot be used: .*surrogates"),
        ({"json_schema": nested(300)}, "json_schema cannot be used: recursion limit"),
        ({"json_schema": nested(5000)}, "json_schema is not JSON: maximum recursion"),
        ({"json_schema": {"enum": [{1}]}}, "json_schema is not JSON: .*set"),
        ({"regex": "a" * 100_001}, "regex cannot be used: it has 100,003 characters"),
        ({"grammar": "start: foo"}, "grammar cannot be used: .*unknown name"),
        ({"json_schema": False}, "json_schema is False"),
        ({"choice": []}, r"choice is \[\]"),
    ],
)
def test_what_cannot_be_followed_is_named_with_the_reason(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.compile(told, re.DOTALL)):
        generator().grammars.constraint(override(Sampling(), given))


def test_a_mask_has_the_width_of_the_logits() -> None:
    constraint = generator().grammars.constraint(Sampling(choice=("a",)))
    assert constraint is not None
    masked = constraint.mask(np.zeros(450, np.float32))
    a = generator().tokenizer.tokenizer.token_to_id("a")
    assert np.flatnonzero(np.isfinite(masked)).tolist() == [a]
    with pytest.raises(UsageError, match=r"choice cannot be followed: .*doesn't satisfy the grammar"):
        generator().grammars.constraint(Sampling(choice=("a",))).advance(a + 1)  # type: ignore[union-attr]
    constraint.advance(a)
    assert constraint.done


def test_an_alternative_too_many_is_named_with_the_reason() -> None:
    kinds = [
        {"type": "object", "properties": {f"k{i}": {"type": "integer"}, "z": {"type": "string"}}} for i in range(300)
    ]
    constraint = generator().grammars.constraint(Sampling(json_schema={"anyOf": kinds}))
    assert constraint is not None
    with pytest.raises(UsageError, match=r"json_schema cannot be followed: .*Current row has .* items"):
        constraint.advance(int(constraint.mask(np.zeros(400, np.float32)).argmax()))
    with pytest.raises(UsageError, match="json_schema cannot be followed"):
        list(generator().stream("a", Sampling(json_schema={"anyOf": kinds})))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    own.decoder = decoders.WordPiece()
    with pytest.raises(UsageError, match="does not support the model's tokenizer"):
        Grammars(own, 2, [1]).constraint(Sampling(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match="llguidance") as raised:
        Grammars(own, 2, [1]).constraint(Sampling(regex="a"))
    assert "deploykit[serve]" in str(raised.value)


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 393, 4096])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_masks_are_the_same_bits_in_c_and_in_numpy(
    vocabulary: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(vocabulary)
    logits = random.normal(size=vocabulary).astype(np.float32)
    logits[: vocabulary // 4] = np.nan
    allowed = random.random(-(-vocabulary // 32) * 32) < share
    packed = np.packbits(allowed, bitorder="little")[: 1 + vocabulary // 9]
    allowed[8 * len(packed) :] = False  # logits may be wider than the mask
    expected = np.where(allowed[:vocabulary], logits, np.float32(-np.inf))
    found = grammar.masked(logits, packed)
    monkeypatch.setattr(grammar, "native_mask", lambda: None)
    for each in (found, grammar.masked(logits, packed)):
        np.testing.assert_array_equal(each.view(np.int32), expected.view(np.int32))
