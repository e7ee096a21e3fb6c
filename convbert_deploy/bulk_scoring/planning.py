"""Finding the input's files and cutting them into shards."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from convbert_deploy.bulk_scoring.options import FORMATS, BulkOptions
from convbert_deploy.bulk_scoring.plan import Column, InputFile, Plan, Shard, Source
from convbert_deploy.bulk_scoring.rows import Scan, scanner
from convbert_deploy.errors import InputError, OutputError


def input_root(path: pathlib.Path) -> pathlib.Path:
    return path if path.is_dir() else path.parent


def find_files(path: pathlib.Path, wanted: str | None) -> tuple[str, tuple[InputFile, ...]]:
    """The format, and the input's files in order of name: ``path``, or all below it.

    In a folder, names that start with a dot or underscore are passed over, and where the format is
    given, files of other suffixes too, unless no file has its suffix.

    Raises:
        InputError: nothing there, an unknown suffix, or files of several formats.
    """
    if path.is_file():
        return wanted or _format_of(path), (InputFile.of(path, path.name),)
    if not path.is_dir():
        raise InputError(f"{path} does not exist: expected a file or a folder of files")
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if wanted:
        files = [file for file in found if file.suffix.lower() in FORMATS[wanted]] or found
    else:
        files = [file for file in found if _suffix_format(file)]
        formats = sorted({_suffix_format(file) for file in files})
        if len(formats) > 1:
            raise InputError(
                f"{path} holds files of several formats: {', '.join(formats)}",
                hint="--format names the one to read",
            )
        wanted = formats[0] if formats else None
    if not files or wanted is None:
        suffixes = ", ".join(suffix for group in FORMATS.values() for suffix in group)
        raise InputError(f"{path} holds no file to score: expected {suffixes}", hint="--format")
    return wanted, tuple(InputFile.of(file, file.relative_to(path).as_posix()) for file in files)


def _suffix_format(path: pathlib.Path) -> str | None:
    suffix = path.suffix.lower()
    return next((name for name, suffixes in FORMATS.items() if suffix in suffixes), None)


def _format_of(path: pathlib.Path) -> str:
    found = _suffix_format(path)
    if found is None:
        raise InputError(
            f"{path} has the suffix {path.suffix!r}, which names no format",
            hint=f"--format {'|'.join(FORMATS)}; unpack a compressed file first",
        )
    return found


def make_plan(path: pathlib.Path, options: BulkOptions, reserved: frozenset[str]) -> Plan:
    """Read through the input once, in bounded memory, and cut it.

    reserved: columns of the output that are not the input's; an input column of such a name comes
    out as ``input_NAME``.

    Raises:
        InputError: unreadable, no rows, files of different columns, or no such column.
        MissingDependencyError: Parquet without pyarrow.
    """
    wanted, files = find_files(path, options.format)
    root = input_root(path)
    scan, shards = Scan(options.shard_rows, columns_wanted=options.keep), []
    for file in files:
        for first, rows, start, stop in scanner(wanted)(root / file.name, scan):
            shards.append(Shard(len(shards), file.name, first, rows, start, stop))
    if not shards:
        raise InputError(f"{path} holds no rows")
    source = Source(
        str(root.resolve()),
        wanted,
        options.text_column,
        files,
        scan.header or (),
        kept_columns(scan.columns(), options.keep, reserved),
    )
    return Plan(source, tuple(shards))


def kept_columns(
    found: Mapping[str, str], keep: tuple[str, ...] | None, reserved: frozenset[str]
) -> tuple[Column, ...]:
    """The input's columns by name and kind, as they come out."""
    absent = [name for name in keep or () if name not in found]
    if absent:
        raise InputError(
            f"the input has no column {', '.join(absent)} to keep: it has {', '.join(found)}"
        )
    names = list(found) if keep is None else list(dict.fromkeys(keep))
    columns = [
        Column(name, found[name], f"input_{name}" if name in reserved else name) for name in names
    ]
    outputs = [column.output for column in columns]
    twice = sorted({name for name in outputs if outputs.count(name) > 1 or name in reserved})
    if twice:
        raise OutputError(
            f"two columns of the output would be called {', '.join(twice)}",
            hint="rename the input's column, or --keep others",
        )
    return tuple(columns)
