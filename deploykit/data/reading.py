"""Define how a file of rows is read: the options that all commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from deploykit.errors import DataError, UsageError

QUOTINGS = ("none", "minimal")
ON_ERROR = ("stop", "skip")
_TABLE_OPTIONS = ("delimiter", "quoting", "no_header", "columns")
_OPTIONS = ("encoding", *_TABLE_OPTIONS)


@dataclass(frozen=True)
class Reading:
    """Options for reading a file of rows; options that are None are detected from the file.

    Attributes:
        encoding: of text files. None: UTF-8, or as the byte order mark says.
        delimiter: the character between the fields of a .csv or .tsv file.
        quoting: of a .csv or .tsv file. "minimal": quotes enclose fields; "none": a quote is a character like others.
        no_header: the first row of a table is data.
        columns: names of the columns of a table without a header. (): "1", "2", …
        on_error: "stop" at a row that is malformed or cannot be used, or "skip" it and continue.
    """

    encoding: str | None = None
    delimiter: str | None = None
    quoting: str | None = None
    no_header: bool = False
    columns: tuple[str, ...] = ()
    on_error: str = "stop"

    def __post_init__(self) -> None:
        # A command gives 1.0 where Python code gives 1: the digests of their inputs must be equal.
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and "float" in str(field.type):
                object.__setattr__(self, field.name, float(value))

    @property
    def is_table(self) -> bool:
        """Whether an option is given that only tables have."""
        return any(getattr(self, name) for name in _TABLE_OPTIONS)

    def check(self) -> None:
        """Raise UsageError for the first invalid option."""
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise UsageError(
                f"--delimiter is {self.delimiter!r}",
                r"give one character, such as ';', '|' or '\t' (a tab); quotes and line ends cannot separate fields",
            )
        if self.quoting not in (None, *QUOTINGS):
            raise UsageError(f"--quoting is {self.quoting!r}", f"choose one of: {', '.join(QUOTINGS)}")
        if self.on_error not in ON_ERROR:
            raise UsageError(f"--on-error is {self.on_error!r}", f"choose one of: {', '.join(ON_ERROR)}")
        if self.columns and not self.no_header:
            raise UsageError(
                "--columns names the columns of a file without a header",
                "add --no-header; columns of a file with a header are chosen by --text-column and the like",
            )
        if not all(map(str.strip, self.columns)) or len(set(self.columns)) < len(self.columns):
            raise UsageError(f"--columns is {','.join(self.columns)!r}", "give each column another name")

    def key(self) -> tuple[object, ...]:
        """Return what determines the rows that are read, for digests."""
        return (self.encoding, self.delimiter, self.quoting, self.no_header, self.columns)

    def refuse(self, what: str) -> None:
        """Raise UsageError if an option is given, because ``what`` is not a file."""
        if given := next((name for name in _OPTIONS if getattr(self, name)), None):
            raise UsageError(f"{flag(given)} is for a file of rows, not {what}", "leave it out")

    def stop_at(self, problems: Sequence[str]) -> None:
        """Raise DataError for the first of ``problems``, a line for each row that cannot be used, unless rows are skipped."""
        if self.on_error == "stop" and problems:
            others = f" ({len(problems) - 1:,} more rows cannot be used)" if len(problems) > 1 else ""
            raise stopped(f"{problems[0]}{others}")

    def allow(self, source: str, *names: str) -> None:
        """Raise UsageError for the first table option that is given, except ``names``, because ``source`` is not a table."""
        for name in _TABLE_OPTIONS:
            if getattr(self, name) and name not in names:
                kinds = ".csv and .tsv files" if name in ("delimiter", "quoting") else ".csv, .tsv and .xlsx files"
                raise UsageError(f"{flag(name)} is for {kinds}, not {source}", "leave it out")

    def named(self, fields_of_row: int, source: str) -> list[str]:
        """Return the columns of a table without a header. Raises UsageError if ``columns`` are not as many as its fields."""
        if self.columns and len(self.columns) != fields_of_row:
            raise UsageError(
                f"--columns names {len(self.columns)} columns, and the first row of {source} has {fields_of_row} fields",
                "name all of them, in their order",
            )
        return list(self.columns) or [str(number) for number in range(1, fields_of_row + 1)]


def flag(name: str) -> str:
    """Return an option as users type it: ``max_length`` is ``--max-length``."""
    return f"--{name.replace('_', '-')}"


def stopped(problem: str) -> DataError:
    """Return the error of a row that cannot be used; ``problem`` names it, and says why."""
    return DataError(problem, "correct the row, or give --on-error skip")


AS_FOUND = Reading()
"""Default options: detect everything from the file."""
