"""Names of options have one meaning in all commands, and earlier names still work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from paths import ROOT

from deploykit.cli import LazyGroup, main
from deploykit.cli_parts.command import Option
from deploykit.stages.finetune_options import make_options, read_toml
from deploykit.training.options import RENAMED

SHARED = {
    "--output": "a file to write, in the format that the command says",
    "--data": "a file of rows, for what the command measures or verifies",
    "--precision": "of the graphs: one to open, several to build or to compare",
    "--engine": "of exports: one to open, several to compare",
    "--text-column": "a training run has no columns to prefer yet, and detects them",
    "--label-column": "as --text-column",
    "--source-column": "as --text-column",
    "--target-column": "as --text-column",
    "--prompt-column": "as --text-column",
    "--completion-column": "as --text-column",
    "--num-beams": "of one search, or of the model that is trained",
    "--source-lang": "of the pairs to train on, or of a checkpoint that was trained elsewhere",
    "--target-lang": "as --source-lang",
    "--seed": "of the random choices that the help names",
    "--top-k": "how many candidates: tokens to sample from, or answers to give",
    "--length-penalty": "of the beams of a translation, or of an answer of a language model",
    "--early-stopping": "as --length-penalty",
    "--min-new-tokens": "of a translation, or of an answer of a language model",
    "--method": "how: to calibrate, or to explain",
    "--report": "a page of what the command measured",
    "--api-key": "of the OpenAI port: those that it takes, or the one to send",
    "--input": "rows to answer; the formats are those of the task",
}
"""Options whose type or help differs between commands on purpose, and the one meaning that they have."""


def _commands() -> dict[str, click.Command]:
    assert isinstance(main, LazyGroup)
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def _visible(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden]


def test_an_option_means_the_same_in_every_command() -> None:
    meanings: dict[str, dict[tuple[Any, ...], list[str]]] = {}
    for name, command in _commands().items():
        for option in _visible(command):
            # A default in brackets belongs to the command.
            help_text = re.sub(r"\s*\[default: .*\]$", "", option.help or "")
            meaning = (str(option.type.to_info_dict()), option.multiple, option.is_flag, option.nargs, help_text)
            for spelling in option.opts:
                meanings.setdefault(spelling, {}).setdefault(meaning, []).append(name)
    several = {spelling: found for spelling, found in meanings.items() if len(found) > 1}
    assert set(several) <= set(SHARED), {s: m for s, m in several.items() if s not in SHARED}
    assert set(SHARED) <= set(several), "each one listed is needed"


def test_the_model_is_the_first_argument_of_every_command() -> None:
    for name, command in _commands().items():
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        shown = [a.metavar or (a.name or "").upper() for a in arguments]
        expected = {
            "finetune": ["[TARGET]"], "bench": ["TARGETS"], "sign": ["TARGETS"], "compare": ["OLD", "NEW"], "unpack": ["BUNDLE"], "serve": [],
            "doctor": [], "demo": [], "top": ["URL"], "predict": ["TARGET", "TEXTS"], "translate": ["TARGET", "TEXTS"],
            "generate": ["TARGET", "TEXTS"], "explain": ["TARGET", "TEXTS"],
        }.get(name, ["TARGET"])  # fmt: skip
        assert shown == expected, name


def test_no_earlier_name_is_a_current_name_in_the_same_command() -> None:
    aliases = 0
    for name, command in _commands().items():
        names = [spelling for option in _visible(command) for spelling in (*option.opts, *option.secondary_opts)]
        for option in command.params:
            for alias in getattr(option, "aliases", ()):
                aliases += 1
                assert alias not in names, (name, alias)
    assert aliases > 30


def test_earlier_names_are_accepted_and_hidden() -> None:
    """Parse each option of each command under every name it ever had."""
    for name, command in _commands().items():
        helped = CliRunner().invoke(main, [name, "--help"]).stdout
        for option in command.params:
            for alias in getattr(option, "aliases", ()):
                assert not re.search(rf"{alias}(?![\w-])", helped), (name, alias)
                context = click.Context(command, info_name=name)
                parsed, _, _ = command.make_parser(context).parse_args([alias] if option.is_flag else [alias, "7"])
                assert option.name in parsed, (name, alias)


def test_errors_have_current_option_names() -> None:
    done = CliRunner().invoke(main, ["bench", "x", "--data", "y", "--concurrency", "none"])
    assert (done.exit_code, "--max-concurrency" in done.stderr) == (2, True)
    done = CliRunner().invoke(main, ["export", "x"])
    assert (done.exit_code, "--output-dir" in done.stderr) == (2, True)


def test_a_toml_file_with_the_earlier_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "finetune.toml").write_text(
        'task = "translation"\nfrom_config = "marian-tiny"\ntrain = "x.tsv"\nsource = "en"\ntarget = "fr"\nepochs = 2.0\n'
        "warmup = 0.2\nlabel_smoothing = 0.2\nearly-stopping = 3\nbeam = 2\nmax_rows = 9\naccumulation = 4\n"
        'schedule = "cosine"\nlora_rank = 0\n'
    )
    options = make_options(read_toml(tmp_path / "finetune.toml"))
    assert {new: getattr(options, new) for old, new in RENAMED.items() if hasattr(options, new)} == {
        "max_train_samples": 9, "num_train_epochs": 2.0, "gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.2, "label_smoothing_factor": 0.2, "early_stopping_patience": 3, "lora_r": 0,
        "source_lang": "en", "target_lang": "fr", "num_beams": 2,
    }  # fmt: skip


def _once(option: click.Option) -> bool:
    return not (option.multiple or option.is_flag)


def test_an_option_of_one_value_is_refused_the_second_time() -> None:
    refused = 0
    for name, command in _commands().items():
        for option in command.params:
            if isinstance(option, click.Option) and _once(option):
                words = [option.opts[0], *["7"] * option.nargs]
                earlier = (*getattr(option, "aliases", ()), option.opts[0])[0]
                done = CliRunner().invoke(main, [name, *words, earlier, *words[1:]])
                assert (done.exit_code, f"{option.opts[0]} is given more than once" in done.stderr) == (2, True), words
                refused += 1
    assert refused > 200


def test_a_switch_and_its_opposite_are_refused_but_a_repeated_switch_is_not() -> None:
    done = CliRunner().invoke(main, ["package", "no/where", "--name", "a", "--in-flight", "--no-in-flight"])
    assert (done.exit_code, "--in-flight is given more than once" in done.stderr) == (2, True)
    done = CliRunner().invoke(main, ["doctor", "--json", "--json"])
    assert "more than once" not in done.stderr


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    for words in (["export", "a", "--output-dir", "b\udcff"], ["predict", "a\udcff", "text"]):
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, "\\xff is not UTF-8" in done.stderr) == (2, True), words


def _typed_in(text: str) -> list[list[str]]:
    """Return the words of each deploykit command on its own line, without shell syntax."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = "\n".join([*fenced, *re.findall(r"^(?: {4}|\t).*$", text, re.MULTILINE)])  # code only, not prose
    lines = re.findall(r"^\s*(?:@\$\(BIN\)/)?deploykit ([a-z]+ .*)$", code.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(re.split(r" (?:[&|>]|#)", line)[0]) for line in lines]


PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"])


def test_the_docs_use_current_names() -> None:
    commands, parsed = _commands(), 0
    for page in PAGES:
        for name, *words in _typed_in(page.read_text(encoding="utf-8")):
            command = commands[name]
            shown = {spelling for option in _visible(command) for spelling in (*option.opts, *option.secondary_opts)}
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            assert given <= shown, (page.name, name, given - shown)
            command.make_parser(click.Context(command, info_name=name)).parse_args(words)
            parsed += 1
    assert parsed > 30


def test_the_demo_uses_current_names() -> None:
    files = [ROOT / "deploykit" / "demo.py", *(ROOT / "deploykit" / "tasks").glob("*/demo.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    shown = {spelling for command in _commands().values() for option in _visible(command) for spelling in option.opts}
    typed = set(re.findall(r'"(--[a-z-]+)"', source))
    assert len(typed) > 10
    assert typed <= shown


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["predict", "--model", "no/where", "hello"], "no/where"),
        (["predict", "hello", "--model", "no/where"], "no/where"),
        (["translate", "--model", "no/where", "hello"], "no/where"),
        (["finetune", "--model", "no/such/model", "--train", "x.csv", "--out", "o"], "no/such/model"),
        (["bundle", "--unpack", "none.tar.gz", "--out", "o"], "none.tar.gz"),
        (["bench", "--compare", "none.json", "none.json"], "none.json"),
    ],
)
def test_earlier_spellings_of_commands_still_do_what_they_did(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert f"error: {named}" in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["predict"], "TARGET"),
        (["finetune", "a", "--model", "b", "--out", "o"], "two checkpoints"),
        (["calibrate", "a", "--out", "o", "--calibration-split", "rows.csv"], "--calibration-data"),
        (
            ["export", "a", "--out", "o", "--calib", "c", "--calibration-data", "rows.csv"],
            "--calibration-data is for rows",
        ),
        (["export", "a", "--out", "o", "--calibration-split", "test", "--calibration-data", "r"], "both given"),
        (["export", "a", "--out", "o", "--trt", "--minShapes", "input_ids:1x1"], "three shapes"),
        (["export", "a", "--out", "o", "--gpu", "sm_86"], "add --trt"),
    ],
)
def test_usage_errors_have_current_names(words: list[str], named: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert named in done.stderr


def test_an_option_class_is_used_for_every_renamed_option() -> None:
    finetune = _commands()["finetune"]
    renamed = {p.name: p for p in finetune.params if p.name in RENAMED.values()}
    assert set(renamed) == set(RENAMED.values())
    for parameter in renamed.values():
        assert isinstance(parameter, Option)
        assert parameter.aliases
