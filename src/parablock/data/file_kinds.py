"""What a file is by its first bytes, how its text is written, and the commands that make it one that is read.

Text is UTF-8, with or without a byte order mark. Anything else is named as what it is.
"""

from __future__ import annotations

import codecs
import json
import shlex
from contextlib import suppress
from pathlib import Path

from parablock.errors import DataError, InputError, no_file, unread

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Suffix behind another one → the codec of it."""

_UNPACK = {".gz": "zcat", ".bz2": "bzcat", ".zst": "zstdcat"}
_HEAD = 4096
"""Bytes from the beginning that tell what a file is."""

_MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32")
_MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16")
"""Byte order marks of other encodings, longer ones first."""
_UNMARKED = {"utf-16-le": "UTF-16", "utf-16-be": "UTF-16BE", "utf-32-le": "UTF-32", "utf-32-be": "UTF-32BE"}
"""Codec of Python → the name of the encoding for `iconv`, which takes the first and the third for it unasked."""

_RENAMED = {
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"BZh": ("compressed with bzip2", ".bz2"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", ".zst"),
    b"PAR1": ("a Parquet file", ".parquet"),
    b"ARROW1": ("an Arrow file", ".arrow"),
}
"""First bytes → what the file is, and the end of the name with which it is read."""
_OTHERS = {
    b"PK\x03\x04": ("a zip archive, or a workbook such as .xlsx", "Unpack it, or save its sheet as CSV in UTF-8."),
    b"\xd0\xcf\x11\xe0": ("a file of an older Office, such as .xls", "Save its sheet as CSV in UTF-8."),
    b"SQLite format 3\0": ("a database of SQLite", "Export its table as CSV in UTF-8."),
    b"\xfd7zXZ\0": ("compressed with xz", "Unpack it (xz -d)."),
    b"7z\xbc\xaf\x27\x1c": ("an archive of 7-Zip", "Unpack it."),
    b"%PDF-": ("a PDF", "Export its text as lines of JSON."),
}
"""First bytes → what the file is, and what to do."""


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file holds, without that of a compression; in small letters."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return Path(name).suffix


def check_is_file(source: str, path: Path) -> None:
    """Refuse a pipe, a socket or a device, which may be read once or never ends, with a `DataError`."""
    if kind := no_file(path):
        raise DataError(
            f"{source} is {kind}, and no file.",
            cause="Rows are read more than once, and nobody may ever write there.",
            remedy="Write the rows to a file, and name that.",
        )


def check_is_text(source: str, path: Path, raw: bytes) -> None:
    """Refuse the content of a file that is no UTF-8 from its first bytes on, with a `DataError`.

    Args:
        source: The file as the user wrote it.
        path: The same file.
        raw: Its content, not compressed.
    """
    refuse_kind(source, path, raw)
    head = raw[:_HEAD]
    if encoding := _other_encoding(head):
        raise DataError(
            f"{source} is in {encoding}, and not in UTF-8.",
            cause=f"Its first bytes are {raw[:4].hex(' ')}; spreadsheets and PowerShell write such files.",
            remedy=f"Convert it: {piped(source, f'iconv -f {encoding} -t UTF-8')} > {_new_name(path)}",
        )
    if 10 * sum(byte < 0x20 and byte not in b"\t\n\v\f\r\x1b" for byte in head) > len(head):
        raise DataError(
            f"{source} is no text: its first bytes are {raw[:8].hex(' ')}.",
            cause="It is a binary file of an unknown kind, or the disk lost what was in it.",
            remedy="Fetch or export it again, as one of the kinds that are read.",
        )


def refuse_kind(source: str, path: Path, raw: bytes) -> None:
    """Refuse content that begins as files of another kind than its name says do, with a `DataError`."""
    begins = next((mark for mark in (*_RENAMED, *_OTHERS) if raw.startswith(mark)), b"")
    if not begins or (begins == b"BZh" and raw[4:10] != b"1AY&SY"):
        return
    if begins in _OTHERS:
        kind, remedy = _OTHERS[begins]
    else:
        kind, ending = _RENAMED[begins]
        if ending in (suffix_of(path), ".arrow" if suffix_of(path) == ".feather" else None):
            return
        is_packed = path.suffix.lower() in COMPRESSIONS
        plain = path.name.removesuffix(path.suffix) if is_packed else path.name
        named = f"{plain if ending in COMPRESSIONS else Path(plain).stem}{ending}"
        kind = f"{kind} inside" if is_packed else kind
        unpacked = f"{_UNPACK.get(path.suffix.lower())} {shlex.quote(source)} > {shlex.quote(f'unpacked_{named}')}"
        remedy = f"Unpack it once: {unpacked}" if is_packed else f"Rename it: as {named} it is read."
    raise DataError(
        f"{source} is {kind}, whatever its name says.",
        cause=f"Its first bytes are {raw[:4].hex(' ')}.",
        remedy=remedy,
    )


def _other_encoding(head: bytes) -> str:
    """Return the encoding of text that is no UTF-8 and says so: by a byte order mark, or by every fourth byte."""
    if marked := next((name for mark, name in _MARKS.items() if head.startswith(mark)), ""):
        return marked
    if b"\0" not in head[:4]:
        return ""
    for codec, name in _UNMARKED.items():
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(codec)().decode(head)
            if text and all(character.isprintable() or character.isspace() for character in text):
                return name
    return ""


def decode_text(source: str, raw: bytes) -> tuple[str, DataError | None]:
    """Return a text and no error, or what comes before the first line that is not UTF-8, and the error for it."""
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        found = error
    line = raw.count(b"\n", 0, found.start) + 1
    before = raw[: raw.rfind(b"\n", 0, found.start) + 1].decode("utf-8-sig")
    return before, DataError(
        f"{source}, line {line}: byte 0x{raw[found.start]:02x} is not UTF-8.",
        cause="The file is in another encoding, such as Windows-1252.",
        remedy=f"Convert it: {piped(source, 'iconv -f WINDOWS-1252 -t UTF-8')} > {_new_name(Path(source))}",
    )


def cannot_be_read(source: str, error: Exception) -> InputError:
    """Return the error of a file that a reader refuses, with its reason; the system's, where it is the system."""
    if isinstance(error, PermissionError):
        return unread(source, error, DataError)
    return DataError(
        f"{source} cannot be read: {getattr(error, 'strerror', None) or error}",
        cause="The file is damaged, or is of another kind than its suffix says.",
        remedy="Fetch or export it again.",
    )


def rows_out_of(source: str, name: str) -> str:
    """Return the advice that takes the list of one field of an object out of a file."""
    path = shlex.quote(f".[{json.dumps(name, ensure_ascii=False)}][]" if not name.isidentifier() else f".{name}[]")
    return f"For the list in {name!r}: {piped(source, f'jq -c {path}')} > rows.jsonl"


def piped(source: str, command: str) -> str:
    """Return the command line that gives a file's text to a command, whatever compresses the file."""
    unpack = _UNPACK.get(Path(source).suffix.lower())
    name = shlex.quote(source)
    return f"{unpack} {name} | {command}" if unpack else f"{command} {name}"


def _new_name(path: Path) -> str:
    plain = path.name.removesuffix(path.suffix) if path.suffix.lower() in COMPRESSIONS else path.name
    return shlex.quote(f"utf8_{plain}")
