"""Read, clean and split the rows of a run in the same way for every task, and keep them in the checkpoint."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from deploykit.data.read import reading_notes
from deploykit.errors import DataError
from deploykit.training.options import FinetuneOptions

Say = Callable[[str], None]
Raw = TypeVar("Raw")
Row = TypeVar("Row")
Columns = TypeVar("Columns")


class Report(Protocol):
    """Numbers of rows that cleaning changed or dropped."""

    def lines(self) -> Iterable[str]: ...

    def to_json(self) -> dict[str, int]: ...


class RowSource(Protocol[Raw, Row, Columns]):
    """How a task reads its rows."""

    def load(self, source: str, split: str, columns: Columns | None) -> tuple[list[Raw], Columns]:
        """Read a file or data set, by the columns that the training rows had."""

    def clean(self, raw: Sequence[Raw]) -> tuple[list[Row], Report]: ...

    def check(self, splits: Mapping[str, Sequence[Row]]) -> None:
        """Raise DataError for rows that no model can be trained or measured on."""

    def drop_leaks(self, train: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], int]:
        """Return training rows without held-out ones, and the number removed."""

    def take(self, rows: Sequence[Row], count: int) -> list[Row]: ...

    def split(self, rows: Sequence[Row], *, validation: float, test: float) -> tuple[list[Row], list[Row], list[Row]]:
        """Return training, validation and test rows; a share of 0 gives none."""


@dataclass(frozen=True)
class Rows(Generic[Row, Columns]):
    """Cleaned rows by split, with their sources and the reports of cleaning."""

    columns: Columns
    splits: dict[str, list[Row]]
    cleaning: dict[str, Report]
    leaks: int

    @property
    def held_out(self) -> str:
        """The split that the result is measured on; "" if no rows are held out."""
        return held_out({name for name, rows in self.splits.items() if rows})


def held_out(splits: Container[str]) -> str:
    """Return the split among ``splits`` that a result is measured on: "test", else "validation", else ""."""
    return next((name for name in ("test", "validation") if name in splits), "")


def read_rows(kind: RowSource[Raw, Row, Columns], options: FinetuneOptions, say: Say) -> Rows[Row, Columns]:
    """Read the files that ``options`` name, clean them, and split off the splits that were not given."""
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    cleaning: dict[str, Report] = {}
    columns: Columns | None = None
    for name in splits:
        source = getattr(options, name)
        if source is None:
            continue
        own_split = name if source == options.train and name != "train" else "train"
        raw, columns = kind.load(source, own_split, columns)
        splits[name], cleaning[name] = kind.clean(raw)
        say(f"{name}: {source}")
        for line in reading_notes(source, options):
            say(f"  {line}")
        for line in cleaning[name].lines():
            say(f"  {line}")
    assert columns is not None
    for name in ("validation", "test"):
        if getattr(options, name) is not None and not splits[name]:
            raise DataError(f"{getattr(options, name)}: no usable rows are left after cleaning", "see the counts above")
    kind.check(splits)
    train, leaks = kind.drop_leaks(splits["train"], splits["validation"] + splits["test"])
    if leaks:
        say(f"  - {leaks:,} training rows dropped: the same text is in --validation or --test")
        if not train:
            raise DataError(
                f"{options.train}: every row is also in --validation or --test", "give other rows to train on"
            )
    if options.max_train_samples and len(train) > options.max_train_samples:
        train = kind.take(train, options.max_train_samples)
        say(f"  {len(train):,} of them are used (--max-train-samples)")
    train, validation, test = kind.split(
        train,
        validation=0 if splits["validation"] else options.validation_fraction,
        test=0 if splits["test"] else options.test_fraction,
    )
    splits = {"train": train, "validation": splits["validation"] or validation, "test": splits["test"] or test}
    say("splits: " + ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items()))
    if not splits["validation"]:
        say(
            "no validation rows: no step is evaluated, training does not stop early, and the model of the last step is kept"
        )
    return Rows(columns, splits, cleaning, leaks)


def named_paths(source: str) -> list[Path]:
    """Return the paths that a data option names on this machine: a file or folder, the two of "a.en,a.fr", those of "corpus"."""
    if Path(source).exists():
        return [Path(source)]
    parts = [Path(part) for part in source.split(",")]
    if len(parts) > 1:
        return parts if all(part.exists() for part in parts) else []
    beside = sorted(parts[0].parent.glob(f"{glob.escape(parts[0].name)}.*"))
    return beside if len(beside) > 1 else []


def absolute(source: str) -> str:
    """Return ``source`` so that it is valid from any folder; a name that is not a local path stays unchanged."""
    if not named_paths(source):
        return source
    return ",".join(str(Path(part).absolute()) for part in ([source] if Path(source).exists() else source.split(",")))


def write_splits(folder: Path, splits: Mapping[str, Sequence[Any]]) -> None:
    """Write each split that has rows as a file of JSON lines."""
    folder.mkdir()
    for name, rows in splits.items():
        if rows:
            lines = (json.dumps(row_record(row), ensure_ascii=False) for row in rows)
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def row_record(row: Any) -> dict[str, Any]:
    """Return the fields of a row, without those that are None by default and here."""
    optional = {field.name for field in dataclasses.fields(row) if field.default is None}
    return {name: value for name, value in dataclasses.asdict(row).items() if value is not None or name not in optional}


def read_split(checkpoint: Path, name: str, kind: type[Row]) -> list[Row]:
    """Return the rows of one of the run's own splits. Raises DataError when the run kept no such rows."""
    path = checkpoint / "splits" / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(f"{checkpoint}: has no {name} rows", "name a file of rows instead")
    with path.open(encoding="utf-8") as lines:
        return [kind(**json.loads(line)) for line in lines]
