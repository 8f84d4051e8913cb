"""Rows out of files, saved `datasets` folders and the Hub. Each row knows where it stands, for messages."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from selftaught.errors import Unreachable, UserError, nearest

HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
CELL_LIMIT = 2**31 - 1  # the csv module stops at 131,072 characters by default, fewer than a long document


class Row(NamedTuple):
    """One row of a source; `where` names it to the user ("line 3")."""

    where: str
    values: Mapping[str, Any]


def read(source: str, split: str, split_given: bool) -> list[Row]:
    """All rows of `source`. Raises UserError for whatever cannot be read, and for a source without rows."""
    path = find(source)
    if path is None:
        rows = _hub(source, split)
    elif path.is_dir():
        rows = _saved(path, split)
    elif split_given:
        raise UserError(f"data.split: {split!r} was given, but {source} is a file and has no splits; leave it out")
    else:
        rows = _file(path)
    if not rows:
        raise UserError(f"data.source: {source} has no rows; give a source with at least one problem")
    return rows


def find(source: str) -> Path | None:
    """The file or folder that `source` names; None: it is a name on the Hub.

    Raises UserError where it can be neither, and for a file of a kind that is not known.
    """
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that may not be read, no such user
        raise UserError(f"data.source: {source!r} cannot be looked at ({error}); check the path") from error
    if path.is_dir():
        return path
    if not path.exists():
        if path.suffix in READERS or source.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(source):
            raise UserError(f"data.source: no file {source!r} (looked in {Path.cwd()}); check the path")
        return None
    if path.suffix not in READERS:
        raise UserError(f"data.source: {path} has the extension {path.suffix!r}; known: {', '.join(READERS)}. "
                        "Convert it, or rename it if it is one of these")
    return path


def _file(path: Path) -> list[Row]:
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f"data.source: {path} cannot be read ({error.strerror or error}); check it") from error


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"data.source: {path} is not UTF-8 text (line {line}); save it as UTF-8") from error


def _object(value: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"data.source: {path}, {where}: expected an object such as "
            f'{{"prompt": ..., "answer": ...}}, got {type(value).__name__}'
        )
    return value


def _jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends in JSON.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.source: {path}, line {number} is not valid JSON ({error}); mend it") from error
        rows.append(Row(f"line {number}", _object(value, path, f"line {number}")))
    return rows


def _json(path: Path) -> list[Row]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.source: {path} is not valid JSON ({error}); if it holds one object a line, name it .jsonl"
        ) from error
    if not isinstance(value, list):
        raise UserError(f"data.source: {path} holds {type(value).__name__}, expected a list of objects")
    return _numbered(_object(item, path, f"item {number}") for number, item in enumerate(value, start=1))


def _csv(path: Path) -> list[Row]:
    csv.field_size_limit(CELL_LIMIT)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows = []
    try:
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"data.source: {path}, line {reader.line_num} has {len(cells)} cells under {len(header)} "
                    "column names; quote cells that hold commas"
                )
            rows.append(Row(f"line {reader.line_num}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"data.source: {path}, line {reader.line_num} is not valid CSV ({error}); mend it") from error
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return _numbered(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"data.source: {path} is not a readable Parquet file ({error})") from error


READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}  # by a file's extension


def _saved(path: Path, split: str) -> list[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds for a folder that it did not write
        raise UserError(
            f"data.source: {path} is a folder, but not one written by `Dataset.save_to_disk` ({error}); "
            f"name a file in it ({', '.join(READERS)})"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"data.split: {path} has no split {split!r}; {nearest(split, map(str, saved))}")
        saved = saved[split]
    return _numbered(saved)


def _hub(source: str, split: str) -> list[Row]:
    import datasets

    match = HUB_NAME.fullmatch(source)
    assert match is not None
    try:
        return _numbered(datasets.load_dataset(match["name"], match["config"], split=split))
    except Exception as error:  # network, authorisation, unknown name, unknown split: the library's message says which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = Unreachable if isinstance(error, ConnectionError) else UserError
        raise kind(
            f"data.source: {source!r} is neither a file here nor a dataset that the Hub gave (split {split!r}): "
            f"{reason}"
        ) from error


def _numbered(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(f"row {number}", row) for number, row in enumerate(rows, start=1)]
