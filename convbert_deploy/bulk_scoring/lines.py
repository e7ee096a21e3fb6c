"""Lines of a file with the bytes they take, and CSV records from them, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import pathlib
from collections.abc import Iterator

from convbert_deploy.errors import InputError

#: bytes of the longest line that is read; a longer one is passed over piece by piece
LONGEST_LINE = 1 << 24

_DELIMITERS = {"csv": ",", "tsv": "\t"}


def lines(path: pathlib.Path, start: int = 0, stop: int | None = None) -> Iterator[tuple]:
    """(text, end) for each line that starts in bytes [start, stop) of a UTF-8 file.

    text: with its line end, without a byte order mark; bytes that are not UTF-8 are lone
    surrogates, which the Scorer refuses for that row alone; None for a line that is too long.
    end: the byte behind the line.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            end = start
            while stop is None or end < stop:
                line = stream.readline(LONGEST_LINE + 1)
                if not line:
                    return
                first, fits = end == 0, len(line) <= LONGEST_LINE
                end += len(line)
                if not fits:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(LONGEST_LINE)
                        end += len(line)
                    yield None, end
                    continue
                if first:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield line.decode("utf-8", "surrogateescape"), end
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def records(
    path: pathlib.Path, format: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[list[str], int]]:
    """(fields, end) for each CSV or TSV record; a quoted field may hold line ends. Blank lines are
    no records.

    Raises:
        InputError: a line or a field that is too long, which an unclosed quote makes of it too.
    """
    end = start

    def counted() -> Iterator[str]:
        nonlocal end
        for text, behind in lines(path, start, stop):
            if text is None:
                raise InputError(f"{path} has a line of more than {LONGEST_LINE} bytes")
            end = behind
            yield text

    # The limit is the module's, so it is put back.
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        for fields in csv.reader(counted(), delimiter=_DELIMITERS[format]):
            if fields:
                yield fields, end
    except csv.Error as error:
        raise InputError(
            f"{path} is not {format.upper()} near byte {end}: {error}",
            hint="a quote may not have been closed",
        ) from error
    finally:
        csv.field_size_limit(before)
