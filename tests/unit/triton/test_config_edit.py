"""Editing the settings of a user's config.pbtxt changes nothing else."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

import pytest

from deploykit.artifacts import load_manifest
from deploykit.errors import ArtifactError
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.protocol import TaskFacts
from deploykit.triton.config_edit import settings_of, with_settings
from deploykit.triton.repository import config_text, validate_config

TUNED = ServingSettings(instances=3, threads=5, preferred_batch_size=16, max_queue_delay_us=500, max_rows=32)
OWN = """\
backend: "deploykit"  # instance_group { count: 9 }
max_batch_size: 32
dynamic_batching <
  preserve_ordering: true; priority_levels: 2
  default_priority_level: 1
>
instance_group: { count: 1, kind: KIND_CPU; gpus: [ ] name: 'count: 8 # no comment' }
parameters [ { key: 'max_queue_delay_microseconds' value { string_value: "7" } },
  { key: "threads", value: { string_value: "1" } } ]
model_warmup [ { name: "a" batch_size: 1 } ]
"""
"""A valid config in another style: other brackets and separators, field names in comments and strings."""


@pytest.fixture
def task(tiny_export: Path) -> TaskFacts:
    return load_manifest(tiny_export, verify=False).task


def test_only_the_lines_of_the_settings_change(task: TaskFacts) -> None:
    text = config_text(task, ServingSettings(queue_timeout_us=7))
    settings = settings_of(text, task, "c")
    assert settings == ServingSettings(instances=2)
    changed = with_settings(text, task, TUNED, "c")
    found = settings_of(changed, task, "c")
    assert found == replace(TUNED, max_rows=found.max_rows)
    lines = [line for line in difflib.ndiff(text.splitlines(), changed.splitlines()) if line[0] == "+"]
    assert [line.split()[1] for line in lines] == [
        "preferred_batch_size:", "max_queue_delay_microseconds:", "instance_group", "parameters",
    ]  # fmt: skip
    assert with_settings(changed, task, settings, "c") == text


def test_a_config_in_another_style_keeps_its_own_fields(task: TaskFacts) -> None:
    changed = with_settings(OWN, task, TUNED, "c")
    config = validate_config(changed)
    assert config.instance_group[0].count == 3
    assert config.instance_group[0].name == "count: 8 # no comment"
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert config.dynamic_batching.preserve_ordering
    assert config.parameters["threads"].string_value == "5"
    assert config.parameters["max_queue_delay_microseconds"].string_value == "7"
    assert config.model_warmup[0].batch_size == 1
    assert "# instance_group { count: 9 }" in changed
    without = OWN.replace("count: 1,", "").replace(',\n  { key: "threads", value: { string_value: "1" } }', "")
    assert settings_of(with_settings(without, task, TUNED, "c"), task, "c") == settings_of(changed, task, "c")


def test_a_translators_rows_are_changed(tiny_translation: Path) -> None:
    task = load_manifest(tiny_translation, verify=False).task
    text = config_text(task, ServingSettings())
    assert settings_of(with_settings(text, task, TUNED, "c"), task, "c") == ServingSettings(
        instances=3, threads=5, max_rows=32
    )


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("max_batch_size", "max_batch_sizes", r"config: is not a Triton model config: 2:1"),
        ("model_warmup", "instance_group { count: 2 } model_warmup", "2 instance groups; tuning needs exactly one"),
        ("preserve_ordering", "preferred_batch_size: [4, 8] preserve_ordering", "preferred_batch_size is 4, 8"),
        ('string_value: "1"', 'string_value: "many"', "parameter threads is 'many'"),
    ],
)
def test_a_config_that_cannot_be_changed_is_refused_and_says_where(
    task: TaskFacts, old: str, new: str, named: str
) -> None:
    text = OWN.replace(old, new, 1)
    with pytest.raises(ArtifactError, match=named):
        settings_of(text, task, "config")


def test_a_classifier_without_dynamic_batching_is_refused(task: TaskFacts) -> None:
    text = 'backend: "deploykit"\ninstance_group { count: 1 }\n'
    with pytest.raises(ArtifactError, match="has no dynamic_batching, in which preferred_batch_size would stand"):
        with_settings(text, task, TUNED, "config")
