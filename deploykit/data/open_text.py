"""Open text files of any encoding, compressed or not, with strict decoding and errors that name the position."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO, cast

from deploykit.data.packages import import_data_package
from deploykit.errors import DataError, UsageError

_SAMPLE_BYTES = 8192
_BLOCK = 1 << 16
_C0_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# UTF-32 first, because its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GIT_LFS = b"version https://git-lfs"
_MAGIC = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook (.xlsx)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x80\x04\x95", "a Python pickle"),
    (_GIT_LFS, "a Git LFS pointer in place of the file (fetch it with git lfs pull)"),
)
ROW_ENDS = "row ends"
"""Ends of lines for ``read_lines``: at ``\n``, so that a lone ``\r`` stays in its text; in a file that begins without
``\n``, also at ``\r``, as old Macs wrote it."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of compressed files; a .zip holds one file."""


def plain_name(path: Path) -> str:
    """Return the name of a file without the suffix of its compression: "tweets.csv" for "tweets.csv.gz"."""
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


def plain_suffix(path: Path) -> str:
    """Return the suffix of a file's format, in lower case, without compression. A .zip without one has that of its
    file.
    """
    suffix = Path(plain_name(path)).suffix.lower()
    if not suffix and path.suffix.lower() == ".zip" and path.is_file():
        with _zip(path) as archive:
            return Path(_only_member(path, archive).filename).suffix.lower()
    return suffix


def read_lines(path: Path, encoding: str | None, *, newline: str | None = None) -> Iterator[str]:
    """Stream the lines of a text file, ends included, without byte order marks: concatenated files have them inside.

    Args:
        path: a text file, or one compressed as its suffix says (``COMPRESSED``).
        encoding: None is UTF-8, or what a byte order mark says.
        newline: as in ``open``, or ``ROW_ENDS``.

    Raises:
        DataError: the file cannot be read, is damaged, is not text, or is not in ``encoding``.
        UsageError: ``encoding`` is not the name of a text encoding.
        MissingDependencyError: a .zst file, and the package zstandard is not installed.
    """
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path}: is not a regular file, and rows are read more than once", "write them to a file first"
        )
    yield from _lines(path, encoding, newline)


def _lines(path: Path, encoding: str | None, newline: str | None) -> Iterator[str]:
    try:
        file, used = _open_text(path, encoding, newline)
        with file:
            try:
                yield from filter(None, (line.lstrip("\ufeff") for line in file))
            except UnicodeError:
                raise _not_decodable(path, used) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", "check the file") from error


def read_text(path: Path, encoding: str | None) -> str:
    """Return the whole text of a file or a pipe, with its own line ends. Raises as ``read_lines``."""
    return "".join(_lines(path, encoding, ""))


def _open_bytes(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    if suffix == ".zip":
        archive = _zip(path)
        return archive.open(_only_member(path, archive))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file, decompressed. Raises EOFError for one that is damaged or was cut: zstandard's reader ends silently there."""

    def __init__(self, path: Path) -> None:
        self._package: Any = import_data_package("zstandard")
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            whole = self._frame is None or self._frame.eof
            block = (self._frame.unused_data if self._frame is not None and whole else b"") or self._file.read(_BLOCK)
            if not block:
                if whole:
                    return 0
                raise EOFError("it ends within its last frame")
            if whole:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(block)
            except self._package.ZstdError as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the one file of an archive, leaving out what macOS adds. Raises DataError when there are several."""
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        names = ", ".join(member.filename for member in members[:5])
        raise DataError(
            f"{path}: holds {len(members)} files{f' ({names}, …)' if names else ''}, and only an archive of one file is read",
            "unpack it, and name the file",
        )
    if members[0].flag_bits & 0x1:
        raise DataError(f"{path}: is encrypted", "unpack it with its password, and name the file")
    return members[0]


def is_git_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer, which Git leaves in place of the file until ``git lfs pull``."""
    with path.open("rb") as file:
        return file.read(len(_GIT_LFS)) == _GIT_LFS


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: the compressed file is damaged: {error}", "compress it again")


def _open_text(path: Path, encoding: str | None, newline: str | None) -> tuple[TextIO, str]:
    """Open a text file with strict decoding. Returns the file and the encoding. Raises DataError for binary content."""
    with _open_bytes(path) as file:
        sample = file.read(_SAMPLE_BYTES)
        whole = None if path.is_file() else sample + file.read()  # a pipe can be read only once
    used = encoding or next((name for mark, name in _BYTE_ORDER_MARKS if sample.startswith(mark)), "utf-8-sig")
    try:
        if newline == ROW_ENDS:
            begin = sample.decode(used, "ignore")
            newline = "" if "\r" in begin and "\n" not in begin else "\n"
        if codecs.lookup(used).name == "utf-8":
            used = "utf-8-sig"  # utf-8-sig, so that a byte order mark does not become part of the first column's name.
        with contextlib.ExitStack() as unless_opened:
            again = unless_opened.enter_context(_open_bytes(path) if whole is None else io.BytesIO(whole))
            opened = io.TextIOWrapper(again, encoding=used, newline=newline)
            unless_opened.pop_all()
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {encoding!r} is not a known text encoding", "give one such as utf-8 or latin-1"
        ) from None
    if seems := _seems_binary(sample, used):
        opened.close()
        raise DataError(f"{path}: is not text: {seems}", "give a text file, or correct the file's suffix")
    return opened, used


def _seems_binary(sample: bytes, encoding: str) -> str | None:
    if kind := next((kind for magic, kind in _MAGIC if sample.startswith(magic)), None):
        return f"it seems to be {kind}"
    decoder = codecs.getincrementaldecoder(encoding)
    try:
        text, valid = decoder("strict").decode(sample), True
    except UnicodeError:
        text, valid = sample.decode("latin-1"), False
    # Text has few control characters besides line ends and tabs; random bytes have 10%.
    if text.count("\0") > 0.4 * len(text):
        name = "utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"
        return f"it has very many NUL bytes, as UTF-16 has (then give --encoding {name})"
    controls = len(_C0_CONTROL.findall(text))
    if controls < 8 or controls < (0.3 if valid else 0.05) * len(text):
        return None
    return "it has very many control characters"


def _not_decodable(path: Path, encoding: str) -> DataError:
    """Return an error that names the first byte that is not ``encoding``.

    The file object's own error counts from an unknown position.
    """
    # Without "-sig" the error's position counts a byte order mark.
    encoding = encoding.removesuffix("-sig")
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line, where = 0, 1, "a part"
    with _open_bytes(path) as file:
        try:
            for block in iter(lambda: file.read(1 << 16), b""):
                text = decoder.decode(block)
                line, offset = line + text.count("\n"), offset + len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The error's position starts at the bytes left over from the previous block.
            kept = len(decoder.getstate()[0])
            good = error.object[: error.start].decode(encoding, "replace")
            where = f"line {line + good.count(chr(10))}, byte offset {offset - kept + error.start},"
        except UnicodeError as error:
            where = f"line {line} ({error})"
    return DataError(
        f"{path}: {where} is not {encoding}", "pass the file's encoding, such as --encoding latin-1, cp1252 or utf-16"
    )
