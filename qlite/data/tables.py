"""Rows out of tables (.csv, .tsv, .parquet) and plain text (.txt, .md), a block or a record batch at a time."""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress

from qlite.data.blocks import HEAD_BYTES, LONGEST_LINE_BYTES, DataFile, Told, opened, shown, text_blocks, what_it_is
from qlite.data.rows import Row
from qlite.errors import DataError
from qlite.units import MIB

PIECE_CHARACTERS = MIB
BATCH_BYTES = 2 * MIB
MOST_ROWS_IN_A_BATCH = 4096


def read_csv(file: DataFile, told: Told) -> Iterator[Row]:
    """Yield the rows of a .csv (commas) or .tsv (tabs) file; its first row names the fields, and every value is text.

    Raises:
        DataError: the names are not distinct, a row has more or fewer values than there are names, or a quote is not closed.
    """
    csv.field_size_limit(LONGEST_LINE_BYTES)  # of the whole process; Python's own, 128 KiB, is less than some answers have
    separator = "\t" if file.path.suffix.lower() == ".tsv" else ","
    # newline="": line ends inside quotes are part of the value, and a lone \r (old Macs) ends a row too.
    lines = (line for block in text_blocks(file, told) for line in io.StringIO(block, newline=""))
    table = csv.reader(lines, delimiter=separator, strict=True)
    names: list[str] = []
    while True:
        begins = table.line_num + 1
        try:
            values = next(table, None)
        except csv.Error as error:
            raise DataError(f"{file.name} line {begins}: {_csv_problem(str(error))}") from error
        if values is None:
            return
        if not values:
            continue
        if not names:
            names = _names(values, file, begins)
        elif len(values) != len(names):
            raise DataError(
                f"{file.name} line {begins}: {len(values)} values, and the first row names {len(names)} fields "
                f"({shown(', '.join(names))}); a value with a separator in it stands in double quotes"
            )
        else:
            yield Row(dict(zip(names, values, strict=True)), file.name, begins)


def _names(values: list[str], file: DataFile, line: int) -> list[str]:
    twice = next((name for index, name in enumerate(values) if name in values[:index]), None)
    if twice is not None:
        raise DataError(f'{file.name} line {line}: two fields are called "{shown(twice)}"; rename one')
    other = next((mark for mark in ";\t," if mark in values[0]), None)
    if len(values) == 1 and other is not None:
        raise DataError(
            f'{file.name} line {line}: one field only, called "{shown(values[0])}": the separator of a .csv file is a comma, '
            "of a .tsv file a tab; save it with that separator"
        )
    return values


def _csv_problem(message: str) -> str:
    if message in ("unexpected end of data", f"field larger than field limit ({LONGEST_LINE_BYTES})"):
        return 'a double quote opens here that is not closed; close it, and write a quote inside a quoted value twice ("")'
    if "expected after" in message:
        return f'text after a closing double quote ({message}); a quote inside a quoted value is written twice ("")'
    return f"not CSV ({message})"


def read_parquet(file: DataFile, told: Told) -> Iterator[Row]:
    """Yield the rows of a .parquet file, in record batches of about 2 MiB.

    Raises:
        DataError: the file is damaged or something else, two columns have one name, or a value cannot be had as a Python object.
    """
    import pyarrow  # slow to import, and only .parquet needs it
    from pyarrow import parquet

    with opened(file) as stream:
        head = stream.read(HEAD_BYTES)
        if not head.startswith(b"PAR1"):
            raise DataError(f"{file.name}: {_not_parquet(head)}")
        size = stream.seek(0, io.SEEK_END)
        try:
            # buffer_size: pages are read as they are needed, not a whole row group's column at a time.
            table = parquet.ParquetFile(stream, buffer_size=MIB, pre_buffer=False)
            _require_distinct(table.schema_arrow.names, file)
            groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
            row_bytes = max(1, sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows))
            done = 0
            batch_rows = min(MOST_ROWS_IN_A_BATCH, max(1, BATCH_BYTES // row_bytes))
            for batch in table.iter_batches(batch_rows, use_threads=False):
                for number, fields in enumerate(_python_rows(batch, done, file), start=done + 1):
                    yield Row(fields, file.name, number, "row")
                done += batch.num_rows
                told(size * done // table.metadata.num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file.name}: damaged Parquet ({shown(str(error), 200)}); write or download it again") from error


def _python_rows(batch, done: int, file: DataFile) -> list[dict]:
    """Return the rows of a record batch, which begins after row ``done``."""
    with suppress(ValueError, OverflowError):
        return batch.to_pylist()
    rows = []
    for number in range(done + 1, done + 1 + batch.num_rows):
        try:
            rows += batch.slice(number - done - 1, 1).to_pylist()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, times that Python has not
            raise DataError(f"{file.name} row {number}: a value cannot be read ({shown(str(error), 200)}); write it anew") from error
    return rows


def _require_distinct(names: list[str], file: DataFile) -> None:
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise DataError(f'{file.name}: two columns are called "{shown(twice)}"; rename one')


def _not_parquet(head: bytes) -> str:
    if not head:
        return "is empty (0 bytes); write or download it again"
    if head.lstrip()[:1] in (b"{", b"["):
        return "is JSON and not Parquet; give it the ending .jsonl (one row a line) or .json (one list)"
    return what_it_is(head) or "is not Parquet (it does not begin with PAR1); give it the ending of what it is, or write it again"


def read_text(file: DataFile, told: Told) -> Iterator[Row]:
    r"""Yield a .txt or .md file as raw text, {"text": ...}: one document, in pieces of about 1 Mi characters, at most 2.

    A piece ends at a line end, or inside a longer line at a blank. Line ends \r\n become \n; a piece of nothing but blanks is left out.
    """
    number, held = 1, None
    for block in text_blocks(file, told):
        for piece in _pieces(block.replace("\r\n", "\n")):
            if piece.strip():
                if held is not None:
                    yield Row({"text": held[1]}, file.name, held[0], goes_on=True)
                held = (number, piece)
            number += piece.count("\n")
    if held is not None:
        yield Row({"text": held[1]}, file.name, held[0])


def _pieces(text: str) -> Iterator[str]:
    # Twice: a block of lines is a little more than its nominal size, and its little more would be a piece of its own.
    while len(text) > 2 * PIECE_CHARACTERS:
        ends = (text.rfind(mark, 0, PIECE_CHARACTERS) + 1 for mark in ("\n", " "))
        cut = next((end for end in ends if end), PIECE_CHARACTERS)
        yield text[:cut]
        text = text[cut:]
    yield text


def read_pairs(file: DataFile, told: Told, separator: str) -> Iterator[Row]:
    """Yield each line of a .txt file as a row, cut at the first ``separator`` into prompt and completion, both stripped.

    Blank lines are left out.

    Raises:
        DataError: a line has no separator.
    """
    before = 0
    for block in text_blocks(file, told):
        lines = block.removesuffix("\n").split("\n")
        for number, line in enumerate(lines, before + 1):
            if not line.strip():
                continue
            prompt, found, completion = line.removesuffix("\r").partition(separator)
            if not found:
                raise DataError(
                    f'{file.name} line {number}: has no separator "{shown(separator)}" between prompt and completion: {shown(line)}'
                )
            yield Row({"prompt": prompt.strip(), "completion": completion.strip()}, file.name, number)
        before += len(lines)
