"""Files of benchmarks as rows: JSON, JSON lines, TSV, Parquet and Excel.

Every function gives one error that names the file, what was expected of it and what it has.
"""

import csv
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from layerfuse.data import text_files
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.benchmarks.interface import Item

Row = dict[str, Any]
"""One record of a file: its cells by the names of their columns."""


@dataclass(frozen=True)
class _Formula:
    """A formula in a cell of an Excel file, such as `=A1+1`."""

    text: str


EXCEL_CELL = 32_767
"""The most characters that a cell of Excel holds; tools that write more cut it without a word."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
"""which of how many files this is, as the hub names them"""


def read_json_value(file: Path) -> Any:
    """What a file of JSON holds, of any shape.

    Args:
        file: may be compressed by gzip.

    Returns:
        Its one value; the list of its records if it is JSON lines.

    Raises:
        LayerfuseError: the file is missing, empty, cut off or no JSON.
    """
    _check_exists(file, "a JSON file")
    try:
        return text_files.read_json(file)
    except LayerfuseError as error:
        raise LayerfuseError(
            f"{error}. A complete JSON file is expected; was its download cut off?"
        ) from error


def read_json(
    file: Path, needed: Sequence[str] = (), key: str = "", id_column: str = ""
) -> list[Row]:
    """The records of a JSON file.

    Args:
        file: a list of records; or JSON lines, which some benchmarks call `.json` too.
        needed: columns that every record must have.
        key: under which the list stands, where the file is a mapping such as `{"data": [...]}`.
        id_column: where the file is a mapping from ids to records, the column that is added to
            each record for its id.

    Returns:
        At least one record.

    Raises:
        LayerfuseError: the file is missing, empty, cut off, or of another shape.
    """
    value = read_json_value(file)
    if key:
        value = _under_key(file, value, key)
    if id_column:
        value = _with_ids(file, value, id_column)
    if not isinstance(value, list):
        raise LayerfuseError(
            f"{file} holds {described(value)}; a list of records is expected. Is it the file of "
            "another benchmark?"
        )
    return _checked_rows(file, cast("list[Any]", value), needed)


def read_json_lines(file: Path, needed: Sequence[str] = ()) -> list[Row]:
    """The records of a file with one JSON record per line.

    Args:
        file: a list of records over several lines is read as well.
        needed: columns that every record must have.

    Returns:
        At least one record.

    Raises:
        LayerfuseError: the file is missing, empty, cut off, or of another shape.
    """
    value = read_json_value(file)
    # A single line is one record, whatever the file is called.
    if isinstance(value, dict):
        value = [cast("Row", value)]
    if not isinstance(value, list):
        raise LayerfuseError(
            f"{file} holds {described(value)}; one JSON record per line is expected"
        )
    return _checked_rows(file, cast("list[Any]", value), needed)


def read_tsv(file: Path, needed: Sequence[str] = ()) -> list[Row]:
    """The rows of a file of tab-separated values with a header line.

    Args:
        file: UTF-8; cells may hold pictures in base64, and line ends within quotes.
        needed: columns that its header must have.

    Returns:
        At least one row; all cells are texts, empty where nothing stands.

    Raises:
        LayerfuseError: the file is missing, empty, cut off, or lacks a column.
    """
    _check_exists(file, "a TSV file")
    text = text_files.read_text(file)
    # The limit of Python's reader, 128 KiB a cell, is below that of a picture.
    usual_limit = csv.field_size_limit(sys.maxsize)
    try:
        # Strict, as a quoted cell that never ends would else swallow the rest without an error.
        table = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        raise LayerfuseError(
            f"{file} is not a complete TSV file: {error}; was its download cut off?"
        ) from error
    finally:
        csv.field_size_limit(usual_limit)
    # Python's reader gives an empty line as a row without cells.
    lines = [cells for cells in table if cells]
    return _rows_of_lines(file, lines, needed)


def read_parquet(files: Path | Sequence[Path], needed: Sequence[str] = ()) -> list[Row]:
    """The rows of Parquet files.

    Args:
        files: one file, or the shards of one table in their order.
        needed: columns that each must have.

    Returns:
        At least one row; a picture's cell is a mapping with its `bytes`, see `picture_from_cell`.

    Raises:
        LayerfuseError: a file is missing, empty, cut off, or lacks a column.
    """
    shards = [files] if isinstance(files, Path) else list(files)
    rows: list[Row] = []
    for file in shards:
        records = _read_parquet_file(file)
        rows += _checked_rows(file, records, needed)
    return rows


def read_xlsx(file: Path, needed: Sequence[str] = ()) -> list[Row]:
    """The rows of the first sheet of an Excel file with a header line.

    Args:
        file: `.xlsx`.
        needed: columns that its header must have.

    Returns:
        At least one row; empty cells are empty texts.

    Raises:
        LayerfuseError: the library openpyxl is not installed; or the file is missing, empty, cut
            off, lacks a column, has two of one name, or in a needed one a formula or a cell as long
            as Excel's longest.
    """
    _check_exists(file, "an Excel file")
    try:
        import openpyxl  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
    except ImportError as error:
        raise LayerfuseError(
            f"reading {file} needs the library openpyxl, which is not installed: run "
            "`pip install 'layerfuse[excel]'`, or save the file as TSV"
        ) from error
    library = cast("Any", openpyxl)
    try:
        # Formulas as they are: their results are not in files that Excel did not calculate.
        book = library.load_workbook(file, read_only=True, data_only=False)
        table: list[list[Any]] = []
        for cells in book.worksheets[0].iter_rows():
            table.append([_excel_value(cell) for cell in cells])
        book.close()
    # openpyxl raises what zipfile, its XML reader and its own checks raise.
    except Exception as error:
        raise LayerfuseError(
            f"{file} is not a complete Excel file: {error}; was its download cut off?"
        ) from error
    lines: list[list[Any]] = []
    for cells in table:
        # Excel keeps lines that were emptied, and pads short ones.
        filled = ["" if cell is None else cell for cell in cells]
        if any(cell != "" for cell in filled):
            lines.append(filled)
    if lines:
        # Typed by people, who see no space behind a name.
        lines[0] = [str(name).strip() for name in lines[0]]
    rows = _rows_of_lines(file, lines, needed)
    for number, row in enumerate(rows, start=1):
        _refuse_cut_cells(file, number, row, needed)
        _replace_formulas(file, number, row, needed)
    return rows


def existing_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of some files that exists.

    Args:
        folder: where they may be.
        names: of the files.

    Returns:
        The file; None if there is none of them.
    """
    for name in names:
        file = folder / name
        if file.is_file():
            return file
    return None


def nothing_found(folder: Path, names: Sequence[str]) -> LayerfuseError:
    """The error for a folder with none of the files that a benchmark reads.

    Args:
        folder: of the benchmark.
        names: of the files, one of which is enough.
    """
    return LayerfuseError(f"there is none of {', '.join(names)} in {folder}; one is expected there")


def first_file(folder: Path, names: Sequence[str]) -> Path:
    """The first file that is there, of those under which a benchmark's questions are known.

    Args:
        folder: of the benchmark.
        names: relative to it, the usual one first.

    Returns:
        The file.

    Raises:
        LayerfuseError: none of them is there.
    """
    file = existing_file(folder, names)
    if file is None:
        raise nothing_found(folder, names)
    return file


def cell_text(file: Path, number: int, row: Row, column: str) -> str:
    """The text in a cell.

    Args:
        file: for the error.
        number: of the row, from 1, for the error.
        row: has the column.
        column: whose cell it is.

    Returns:
        The text; a number is written out.

    Raises:
        LayerfuseError: there is neither a text nor a number.
    """
    cell = row[column]
    # JSON's true and false are whole numbers to Python.
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    if not is_number and not isinstance(cell, str):
        raise LayerfuseError(
            f"{file} has {described(cell)} as {column!r} in row {number}; a text is expected"
        )
    return str(cell)


def cell_texts(file: Path, number: int, row: Row, column: str) -> tuple[str, ...]:
    """The texts of a list in a cell.

    Args:
        file: for the error.
        number: of the row, from 1, for the error.
        row: has the column.
        column: whose cell it is.

    Returns:
        At least one text.

    Raises:
        LayerfuseError: there is no list, an empty one, or something else than texts in it.
    """
    cell = row[column]
    if not isinstance(cell, list) or not cell:
        raise LayerfuseError(
            f"{file} has {described(cell)} as {column!r} in row {number}; a list of texts is "
            "expected, with at least one"
        )
    texts: list[str] = []
    for value in cast("list[Any]", cell):
        texts.append(cell_text(file, number, {column: value}, column))
    return tuple(texts)


def shards_like(folder: Path, pattern: str) -> list[Path]:
    """The files of one table that the hub split into several.

    Args:
        folder: where they are.
        pattern: of their names, such as `data/validation-*.parquet`.

    Returns:
        At least one file, sorted.

    Raises:
        LayerfuseError: there is none, or some of `-00000-of-00005` are missing.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise LayerfuseError(f"there is no {pattern} in {folder}")
    found = {file.name for file in files}
    for file in files:
        shard = _SHARD.search(file.name)
        # Files that are whole have no such number.
        if shard is None:
            continue
        of = int(shard[2])
        others = [name for name in found if f"-of-{shard[2]}" in name]
        if len(others) != of:
            raise LayerfuseError(
                f"{folder} has {len(others)} of the {of} files like {file.name}; all are expected"
            )
    return files


def unique_ids(items: Iterable[Item]) -> None:
    """Refuse questions with the same id.

    Args:
        items: the questions.

    Raises:
        LayerfuseError: names the first id that comes twice.
    """
    places: dict[str, int] = {}
    for place, item in enumerate(items, start=1):
        if item.id in places:
            raise LayerfuseError(
                f"the questions {places[item.id]} and {place} have the same id {item.id!r}; every "
                "question needs an id of its own. Is a file or a part of it there twice?"
            )
        places[item.id] = place


def checked_items(file: Path, items: list[Item]) -> list[Item]:
    """Check what a benchmark loaded.

    Args:
        file: of the questions, for the error.
        items: the questions.

    Returns:
        The same questions.

    Raises:
        LayerfuseError: there are none, or ids repeat.
    """
    if not items:
        raise LayerfuseError(f"{file} has no questions that the benchmark asks")
    try:
        unique_ids(items)
    except LayerfuseError as error:
        raise LayerfuseError(f"{file}: {error}") from error
    return items


def _check_exists(file: Path, kind: str) -> None:
    """Raise LayerfuseError for a file that is missing, empty or a folder."""
    if not file.exists():
        reason = "" if file.parent.is_dir() else f" (there is no folder {file.parent} either)"
        raise LayerfuseError(f"there is no file {file}; {kind} is expected there{reason}")
    if not file.is_file():
        raise LayerfuseError(f"{file} is no file; {kind} is expected there")
    if file.stat().st_size == 0:
        raise LayerfuseError(f"{file} is empty; {kind} is expected. Was its download cut off?")


def _under_key(file: Path, value: Any, key: str) -> Any:
    """What a mapping in a file has under a key.

    Raises:
        LayerfuseError: it is no mapping, or has no such key.
    """
    if not isinstance(value, dict):
        raise LayerfuseError(
            f"{file} holds {described(value)}; a mapping with a list under {key!r} is expected. "
            "Is it the file of another benchmark?"
        )
    mapping = cast("Row", value)
    if key not in mapping:
        raise LayerfuseError(
            f"{file} has no list under {key!r}; it has {_names(mapping)}. Is it the file of "
            "another benchmark?"
        )
    return mapping[key]


def _with_ids(file: Path, value: Any, id_column: str) -> list[Any]:
    """The records of a mapping from ids, each with its id in a column.

    Raises:
        LayerfuseError: it is no mapping of records.
    """
    if not isinstance(value, dict):
        raise LayerfuseError(
            f"{file} holds {described(value)}; a mapping from ids to records is expected. Is it "
            "the file of another benchmark?"
        )
    rows: list[Any] = []
    for name, record in cast("Row", value).items():
        if not isinstance(record, dict):
            raise LayerfuseError(
                f"{file} has {described(record)} under {name!r}; a record is expected. Is it the "
                "file of another benchmark?"
            )
        rows.append({**cast("Row", record), id_column: name})
    return rows


def _excel_value(cell: Any) -> Any:
    """What a cell of openpyxl holds, formulas marked as such."""
    return _Formula(str(cell.value)) if cell.data_type == "f" else cell.value


def _refuse_cut_cells(file: Path, number: int, row: Row, needed: Sequence[str]) -> None:
    """Raise LayerfuseError for a needed cell that is as long as Excel's longest."""
    for column in needed:
        cell = row[column]
        if isinstance(cell, str) and len(cell) >= EXCEL_CELL:
            raise LayerfuseError(
                f"{file} has {column!r} in row {number} with {EXCEL_CELL:,} characters, the most "
                "that a cell of Excel holds, so that the rest of it is lost (a picture in base64, "
                "usually): take the TSV or Parquet file instead"
            )


def _replace_formulas(file: Path, number: int, row: Row, needed: Sequence[str]) -> None:
    """Write the formulas of a row as texts.

    Raises:
        LayerfuseError: one stands in a needed column.
    """
    for column, cell in row.items():
        if not isinstance(cell, _Formula):
            continue
        if column in needed:
            raise LayerfuseError(
                f"{file} has the formula {short(cell.text)} as {column!r} in row {number}; a text "
                "or a number is expected. Many tools write a text that begins with = as a formula: "
                "give JSON lines or TSV instead"
            )
        row[column] = cell.text


def _rows_of_lines(file: Path, lines: Sequence[Sequence[Any]], needed: Sequence[str]) -> list[Row]:
    """The rows of a table whose first line names the columns.

    Raises:
        LayerfuseError: there are no rows, one has another number of cells than the header, or two
            columns have one name.
    """
    if not lines:
        raise LayerfuseError(f"{file} has no line; a header and rows are expected")
    header = [str(name) for name in lines[0]]
    for name in header:
        # Columns without a name are not read, however many there are.
        if name and header.count(name) > 1:
            raise LayerfuseError(
                f"{file} has {header.count(name)} columns {name!r}; columns of different names are "
                "expected, of which none is lost"
            )
    rows: list[Row] = []
    for number, cells in enumerate(lines[1:], start=1):
        # A download that was cut off ends within a row.
        if len(cells) != len(header):
            raise LayerfuseError(
                f"{file} has {len(cells)} cells in row {number}, and {len(header)} columns "
                f"({', '.join(header)}); was its download cut off?"
            )
        rows.append(dict(zip(header, cells, strict=True)))
    return _checked_rows(file, rows, needed)


def _read_parquet_file(file: Path) -> list[Any]:
    """The rows of one Parquet file.

    Raises:
        LayerfuseError: it is missing, empty, cut off or of another kind.
    """
    _check_exists(file, "a Parquet file")
    # Slow to import, and needed for few benchmarks.
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]
    from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

    library = cast("Any", parquet)
    arrow_error = cast("type[Exception]", cast("Any", pyarrow).ArrowException)
    try:
        return library.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError, arrow_error) as error:
        raise LayerfuseError(
            f"{file} is not a complete Parquet file: {error}; was its download cut off?"
        ) from error


def _checked_rows(file: Path, values: list[Any], needed: Sequence[str]) -> list[Row]:
    """The records of a file.

    Raises:
        LayerfuseError: there are none, or one is no mapping or lacks a column.
    """
    if not values:
        raise LayerfuseError(f"{file} has no records; at least one is expected")
    rows: list[Row] = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise LayerfuseError(
                f"{file} has {described(value)} as record {number}; a mapping is expected. Is it "
                "the file of another benchmark?"
            )
        row = cast("Row", value)
        # Every row, as records of JSON need not have the same columns.
        for column in needed:
            if column not in row:
                raise LayerfuseError(
                    f"{file} has no {column!r} in row {number}; the row has {_names(row)}, and "
                    f"needed are {', '.join(needed)}. Is it the file of another benchmark?"
                )
        rows.append(row)
    return rows


def _names(mapping: Mapping[str, Any]) -> str:
    """The first keys of a mapping, for errors."""
    names = list(mapping)
    shown = ", ".join(short(name) for name in names[:12])
    if len(names) > 12:
        return f"{shown} and {len(names) - 12} more"
    return shown or "nothing"


def described(value: Any) -> str:
    """What kind of value this is, for errors."""
    if isinstance(value, list):
        return f"a list of {len(cast('list[Any]', value))}"
    if isinstance(value, dict):
        return f"a mapping with {_names(cast('Row', value))}"
    return short(value)
