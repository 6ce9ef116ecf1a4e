"""Options of commands that sample text from a language model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from deploykit.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--max-new-tokens", type=int, help="Maximum number of tokens to generate. [default: 256]"),
    click.option("--temperature", type=float, help="Temperature of sampling; 0 is greedy search. [default: 0]"),
    click.option("--top-k", type=int, help="Sample from this many of the likeliest tokens; 0: off."),
    click.option("--top-p", type=float, help="Sample from the likeliest tokens with this total probability; 1: off."),
    click.option("--min-p", type=float, help="Leave out tokens less likely than this share of the likeliest; 0: off."),
    click.option(
        "--typical-p", type=float, help="Sample from the most typical tokens with this total probability; 1: off."
    ),
    click.option("--repetition-penalty", type=float, help="Divide the scores of tokens that already occurred; 1: off."),
    click.option(
        "--presence-penalty", type=float, help="Subtract this from the scores of tokens in the answer; 0: off."
    ),
    click.option(
        "--frequency-penalty", type=float, help="Subtract this for each time a token is in the answer; 0: off."
    ),
    click.option("--seed", type=int, help="Seed of sampling: the same seed gives the same answer. [default: 0]"),
    click.option(
        "--logit-bias", multiple=True, metavar="ID=NUMBER", help="Add to the score of a token; may be repeated."
    ),
    click.option("--stop", multiple=True, help="Text that ends an answer; may be repeated."),
    click.option("--stop-token-ids", multiple=True, type=int, help="Token id that ends an answer; may be repeated."),
    click.option("--min-new-tokens", type=int, help="Minimum number of tokens of an answer. [default: 0]"),
    click.option("--ignore-eos", is_flag=True, help="Continue after the model's end tokens."),
    click.option("--num-beams", type=int, help="Beam search with this many beams; 1: none."),
    click.option("--length-penalty", type=float, help="Exponent of the length that scores of beams are divided by."),
    click.option("--early-stopping", help="When beam search ends: true, false or never, as in Hugging Face."),
    click.option("--n", type=int, help="Number of answers to each prompt. [default: 1]"),
    click.option("--best-of", type=int, help="Generate this many answers and keep the --n likeliest per token."),
    click.option(
        "--logprobs", type=int, help="Also report the log-probability of each token and of this many likeliest tokens."
    ),
    click.option("--json-schema", metavar="FILE|JSON", help="JSON Schema that answers fit; true: any JSON object."),
    click.option("--regex", help="Regular expression that answers match."),
    click.option("--choice", multiple=True, help="A text that an answer may be; may be repeated."),
    click.option("--grammar", type=click.Path(path_type=Path), help="File of a Lark grammar that answers match."),
)


def sampling_options(function: Function) -> Function:
    """Add the options; ``given_sampling`` reads them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def given_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters that the command line names."""
    given = {name: value for name, value in options.items() if value is not None and value != () and value is not False}
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    if "json_schema" in given:
        given["json_schema"] = _schema(given["json_schema"])
    if "grammar" in given:
        given["grammar"] = _read("--grammar", given["grammar"])
    return given


def _bias(text: str) -> tuple[str, float]:
    token, _, bias = text.partition("=")
    try:
        return token, float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias {text}: is not a token id, = and a number", "write 42=-100") from None


def _schema(given: str) -> Any:
    text = given if given.lstrip().startswith("{") or given == "true" else _read("--json-schema", Path(given))
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--json-schema {given}: is not JSON: {error}", "correct it") from None


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be read: {error}", "give a file of UTF-8 text") from None
