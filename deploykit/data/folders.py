"""Find the rows in a folder: the files of a split, as dataset repositories keep them, or a folder of texts per label."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploykit.data.open_text import plain_suffix, read_lines
from deploykit.data.packages import import_data_package
from deploykit.data.record import Record
from deploykit.errors import DataError
from deploykit.text import normalize

_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_CARD = re.compile(r"\A---\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def folder_files(folder: Path, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the data files of a split; [] for a folder without data files.

    The dataset card (README.md) says which files make a split; otherwise their names do:
    "train-00000-of-00002.parquet", "data/dev.jsonl", "train/0001.csv". A single file without such a name is read for
    every split.

    Raises:
        DataError: the files belong to other splits, or the card has several configurations.
    """
    if (patterns := _card_patterns(folder, split)) is not None:
        found = sorted({path for pattern in patterns for path in _inside(folder, pattern)})
        if not found:
            raise DataError(
                f"{folder}: no file matches {', '.join(patterns)}, which its README.md names", "clone it whole"
            )
        return found
    files = sorted(path for path in _data_files(folder) if plain_suffix(path) in suffixes)
    mine = [path for path in files if _split_of(path.relative_to(folder)) == split]
    if mine or not files:
        return mine
    if len(files) == 1 and _split_of(files[0].relative_to(folder)) is None:
        return files
    known = sorted({name for path in files if (name := _split_of(path.relative_to(folder)))})
    raise DataError(
        f"{folder}: has no files of the split {split!r}" + (f"; it has {', '.join(known)}" if known else ""),
        "name a file of it",
    )


def texts_by_folder(folder: Path, split: str, encoding: str | None) -> Iterator[Record] | None:
    """Return a row {text, label} for each .txt file one folder below; None if there are no such files.

    The folders' names are the labels. If there is a folder named after the split, its subfolders are used.
    """
    root = next((folder / name for name in _SPLIT_NAMES.get(split, (split,)) if (folder / name).is_dir()), folder)
    files = sorted(path for path in root.glob("*/*.txt") if path.is_file())
    return _texts(folder, files, encoding) if files else None


def _texts(folder: Path, files: list[Path], encoding: str | None) -> Iterator[Record]:
    for path in files:
        text = "".join(read_lines(path, encoding))
        yield Record(normalize(str(path.relative_to(folder))), {"text": text, "label": path.parent.name})


def _data_files(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "data", *(folder / n for names in _SPLIT_NAMES.values() for n in names)):
        if place.is_dir():
            yield from (path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name, or else its folder's, begins with."""
    for part in (path.name, *reversed(path.parts[:-1])):
        word = re.split(r"[-_.]", part.lower(), maxsplit=1)[0]
        for split, names in _SPLIT_NAMES.items():
            if word in names:
                return split
    return None


def _card_patterns(folder: Path, split: str) -> list[str] | None:
    """Return the patterns of a split's files in the dataset card, None where it names no files."""
    card = folder / "README.md"
    found = _CARD.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if found is None:
        return None
    yaml = import_data_package("yaml")
    try:
        configs: Any = (yaml.safe_load(found[1]) or {}).get("configs")
    except (yaml.YAMLError, AttributeError):
        return None  # a README.md that is not a dataset card
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        return None
    chosen = [config for config in configs if config.get("default")] or configs
    if len(chosen) > 1:
        chosen = [config for config in configs if config.get("config_name") == "default"] or chosen
    if len(chosen) > 1:
        names = ", ".join(str(config.get("config_name")) for config in chosen)
        raise DataError(f"{folder}: its README.md has several configurations: {names}", "name the files of one")
    files = chosen[0].get("data_files")
    if isinstance(files, str):
        return [files] if split == "train" else None
    if not isinstance(files, list):
        return None
    by_split = {str(part.get("split")): part.get("path") for part in files if isinstance(part, dict)}
    name = next((name for name in (split, *_SPLIT_NAMES.get(split, ())) if name in by_split), None)
    if name is None:
        raise DataError(f"{folder}: has no split {split!r}", f"it has {', '.join(by_split)}")
    paths = by_split[name]
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])]


def _inside(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the files that match a card's pattern, and none outside the folder."""
    for path in map(Path, glob.iglob(pattern, root_dir=folder, recursive=True)):
        # Compare names, not the targets of links: the hub's cache links each file to another folder.
        if not path.is_absolute() and ".." not in path.parts and (folder / path).is_file():
            yield folder / path
