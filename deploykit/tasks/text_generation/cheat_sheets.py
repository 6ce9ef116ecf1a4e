"""Fetch pairs of a description and a shell command without a hub: the cheat sheets inside two PyPI source archives.

The sheets are under GPL-3.0 and MIT (cheat) and MIT (eg): they are fetched to train an example, and not redistributed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from deploykit.artifacts import new_directory
from deploykit.data.pypi_archives import Sdist, fetch

CHEAT = Sdist(
    "cheat", "2.5.1", "c537c0ead9f4cb47f0861818a36ce8f6fc844cd7fc2879479dfbb29a335f2ec6", "cheat/cheatsheets/"
)
EG = Sdist("eg", "1.2.3", "31f221b24701a9fc4b034d9593f081859d943b14bf26b2e98190509b64e2622b", "eg/examples/")
_LONGEST = 200
"""Characters of a description or a command; longer ones are explanations and scripts."""
_URL = re.compile(r"https?://")
_PLACEHOLDER = re.compile(r"<([A-Za-z][\w./ -]*)>")


def fetch_command_pairs(out: Path, cheat: Sdist = CHEAT, eg: Sdist = EG) -> Path:
    """Fetch the sheets to the folder ``out`` and write out/pairs/commands.jsonl: objects with "prompt" and "completion".

    Files of an earlier call are reused. Raises DeploykitError when an archive cannot be downloaded or is not
    the expected one.
    """
    pairs = out / "pairs"
    if not pairs.exists():
        found: dict[tuple[str, str], None] = {}
        for archive, read in ((cheat, comment_pairs), (eg, sentence_pairs)):
            folder = out / f"{archive.package}-{archive.version}"
            fetch(archive, folder)
            for sheet in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in ("", ".md")):
                found.update(dict.fromkeys(read(sheet.read_text(encoding="utf-8", errors="replace"))))
        with new_directory(pairs, shared=True) as directory:
            lines = (json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in found)
            (directory / "commands.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pairs / "commands.jsonl"


def comment_pairs(sheet: str) -> Iterator[tuple[str, str]]:
    """Return the pairs of a sheet of ``cheat``: ``#`` lines, and the one line of code below them."""
    comment: list[str] = []
    code: list[str] = []
    for line in [*sheet.splitlines(), "#"]:
        if line.lstrip().startswith("#") or not line.strip():
            if code:
                yield from _pair(" ".join(comment), code)
                comment, code = [], []
            # A blank line below a comment means that the code after it belongs to no comment.
            comment = [*comment, line.strip().lstrip("#").strip()] if line.strip() else []
        else:
            code.append(line)


def sentence_pairs(sheet: str) -> Iterator[tuple[str, str]]:
    """Return the pairs of a sheet of ``eg``, which is Markdown: a paragraph, and the indented command below it.

    Where a line begins with ``$``, the lines below it are the command's output.
    """
    paragraph: list[str] = []
    blocks = re.split(r"\n\s*\n", f"\n{sheet}")
    for block in blocks:
        lines = [line for line in block.splitlines() if line.strip()]
        if lines and all(line.startswith("    ") for line in lines):
            commands = [line.strip() for line in lines]
            if commands[0].startswith("$ "):
                commands = [line[2:] for line in commands if line.startswith("$ ")]
            yield from _pair(" ".join(paragraph), commands)
            paragraph = []
        else:
            paragraph = [] if any(line.startswith("#") for line in lines) else lines


def _pair(description: str, code: list[str]) -> Iterator[tuple[str, str]]:
    """Return the pair if it is a clean one: a description in words, and one command on one line."""
    description = " ".join(description.replace("`", "").split()).removesuffix(":").strip()
    description = re.sub(r"^(To|How to) (?=[a-z])", "", description)
    description = description[:1].upper() + description[1:]
    if len(code) != 1 or not description or len(description.split()) < 2 or _URL.search(description):
        return
    command = re.sub(r"\s+# .*$", "", code[0].strip().removeprefix("$ ")).strip()
    # Bash reads <file name> as two redirections: FILE_NAME.
    command = _PLACEHOLDER.sub(lambda found: re.sub(r"\W+", "_", found[1]).upper(), command)
    if not command or command.endswith("\\") or max(len(description), len(command)) > _LONGEST:
        return
    yield description, command
