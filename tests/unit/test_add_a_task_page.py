"""docs/add-a-task.md quotes existing code, and lists the whole protocol."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

from deploykit.tasks import protocol
from deploykit.tasks.registry import task_names

PAGE = (ROOT / "docs" / "add-a-task.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "tests" / "packages" / "token_classification"
QUOTED = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)


def _members(part: type) -> set[str]:
    return {name for name in {*vars(part), *part.__annotations__} if not name.startswith("_")}


@pytest.mark.parametrize(("file", "text"), QUOTED)
def test_a_quotation_matches_the_file(file: str, text: str) -> None:
    folder = ROOT if file.startswith("deploykit/") else PACKAGE
    assert text in (folder / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["Training", "Exporting", "Serving", "Measuring", "Task"])
def test_the_table_lists_the_members_of_each_part(part: str) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{part}` |"))
    assert set(re.findall(r"`(\w+)`", row.split("|")[3])) == _members(getattr(protocol, part))


def test_the_protocol_is_short_and_each_member_is_documented() -> None:
    text = Path(protocol.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for part in (protocol.Training, protocol.Exporting, protocol.Serving, protocol.Measuring, protocol.Task):
        assert part.__doc__
        assert all(getattr(part, name).__doc__ for name in _members(part) if callable(getattr(part, name, None)))


def test_only_a_tasks_folder_compares_with_its_name() -> None:
    compares = re.compile(rf"""([!=]=|\bin|\bcase) ?[\[({{]?["']({"|".join(task_names())})["']""")
    package = ROOT / "deploykit"
    files = [file for file in package.rglob("*.py") if package / "tasks" not in file.parents]
    found = [
        f"{file}: {line}" for file in files for line in file.read_text("utf-8").splitlines() if compares.search(line)
    ]
    assert found == []
