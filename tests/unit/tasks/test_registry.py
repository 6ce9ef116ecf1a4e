"""Finding a task by name, checkpoint or manifest, also one of another package."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import click
import pytest
from click.testing import CliRunner

from deploykit.cli import main
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.sampling import Sampling
from deploykit.tasks import registry
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.types import Command


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "classification"),
        ({"model_type": "marian", "architectures": ["MarianMTModel"], "is_encoder_decoder": True}, "translation"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "translation"),
        # An encoder-decoder with a classification head is a classifier.
        ({"model_type": "bart", "architectures": ["BartForSequenceClassification"], "is_encoder_decoder": True},
         "classification"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "translation"),
        # No task claims this head, but optimum infers the class that loads it.
        ({"model_type": "encoder-decoder", "architectures": ["EncoderDecoderModel"]}, "translation"),
        ({"model_type": "marian", "architectures": ["OfNoLibraryModel"]}, "translation"),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, "question-answering"),
        ({"model_type": "flaubert", "architectures": ["FlaubertForQuestionAnsweringSimple"]}, "question-answering"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_for_the_task_of_its_head(config: dict[str, object], task: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert registry.task_of_checkpoint(tmp_path).name == task


def test_the_manifest_of_a_checkpoint_decides_before_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "checkpoint", "task": {"name": "translation"}}))
    assert registry.task_of_checkpoint(tmp_path).name == "translation"


def test_an_adapter_without_a_config_is_a_classifiers(tmp_path: Path) -> None:
    assert registry.task_of_checkpoint(tmp_path).name == "classification"


def test_facts_survive_a_manifest() -> None:
    for facts in (
        Classification(("a", "b"), 64, 0, multi_label=True),
        QuestionAnswering(384, 128, 0, no_answer_threshold=-1.5),
        Translation("en", "fr", "marian", 100, 64, 64, 1, (0,), 1, languages=("fr",)),
        TextGeneration("llama", 400, 256, 5, (2, 4), {"bos_token": "<s>"}, Sampling(stop=("x",)), ("text", "text", "")),
    ):
        assert registry.task_from_json(json.loads(json.dumps(registry.task_to_json(facts)))) == facts


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown task 'poetry'") as refused:
        registry.get_task("poetry")
    assert "classification, translation" in str(refused.value.remedy)
    with pytest.raises(ArtifactError, match="cannot read"):
        registry.task_from_json({"name": "poetry"})


@dataclass(frozen=True)
class Words:
    """Facts of a task in another package."""

    name: ClassVar[str] = "words"
    labels: tuple[str, ...]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose entry point adds the task ``words``."""
    module = ModuleType("words_package")
    module.TASK = SimpleNamespace(  # type: ignore[attr-defined]
        name="words", heads=("ForTokenClassification",), model_types=(), read_facts=lambda record: Words(**record),
        commands={name: Command("words_package.command", f"The {name} of words.") for name in ("tag", "chat", "serve")},
    )  # fmt: skip
    command = ModuleType("words_package.command")
    command.command = click.Command("tag", help="Tag words.")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "words_package", module)
    monkeypatch.setitem(sys.modules, "words_package.command", command)
    point = SimpleNamespace(name="words", value="words_package:TASK")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    for cached in (registry._locations, registry.get_task):
        cached.cache_clear()
    yield
    for cached in (registry._locations, registry.get_task):
        cached.cache_clear()


@pytest.mark.usefixtures("added")
def test_a_task_that_cannot_be_imported_is_named_with_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "words_package", None)
    with pytest.raises(UsageError, match="the task words cannot be loaded from words_package:TASK") as refused:
        registry.get_task("words")
    assert "uninstall the package" in str(refused.value.remedy)


@pytest.mark.usefixtures("added")
def test_a_task_of_another_package_is_found_by_name_head_and_manifest(tmp_path: Path) -> None:
    assert registry.task_names() == ["classification", "translation", "question-answering", "text-generation", "words"]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForTokenClassification"]}))
    assert registry.task_of_checkpoint(tmp_path).name == "words"
    assert registry.task_from_json({"name": "words", "labels": ["x", "y"]}) == Words(("x", "y"))


@pytest.mark.usefixtures("added")
def test_a_command_of_an_added_task_is_one_of_deploykit() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "The tag of words." in shown
    assert shown.index("predict ") < shown.index("tag ") < shown.index("bench ")
    assert CliRunner().invoke(main, ["tag", "--help"]).output.splitlines()[2] == "  Tag words."


@pytest.mark.usefixtures("added")
def test_an_added_command_does_not_replace_another() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "The chat of words." not in shown
    assert "The serve of words." not in shown
    for name, line in (("chat", "Chat with TARGET"), ("serve", "Serve a model repository")):
        assert CliRunner().invoke(main, [name, "--help"]).output.splitlines()[2].strip().startswith(line)


@pytest.mark.usefixtures("added")
def test_help_is_shown_if_an_added_task_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "words_package", None)
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    assert " chat " in shown.output
    refused = CliRunner().invoke(main, ["tag"])
    assert refused.exit_code == 2
    assert "the task words cannot be loaded from words_package:TASK" in refused.output
