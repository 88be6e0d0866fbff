"""The files of benchmarks as rows, and the pictures within them."""

import base64
import gzip
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import official_files
from layerfuse.evaluate.benchmarks.interface import Item
from layerfuse.evaluate.benchmarks.official_pictures import (
    check_pictures,
    picture_file,
    picture_from_base64,
    picture_from_bytes,
    picture_from_cell,
)
from layerfuse.vision.picture import Picture

ROWS = [{"id": 1, "question": "how many?"}, {"id": 2, "question": "which\ncolour?"}]
NEEDED = ("id", "question")
Reader = Callable[[Path, tuple[str, ...]], list[dict[str, Any]]]


def png() -> bytes:
    """An encoded picture."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


def write(file: Path) -> Path:
    """Write `ROWS` in the format that the file's suffix says."""
    if file.suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif file.suffix == ".tsv":
        file.write_text('id\tquestion\n1\thow many?\n2\t"which\ncolour?"\n')
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file


ALL = [
    (official_files.read_json, "rows.json"),
    (official_files.read_json_lines, "rows.jsonl"),
    (official_files.read_tsv, "rows.tsv"),
    (official_files.read_parquet, "rows.parquet"),
]


@pytest.mark.parametrize(("reader", "name"), ALL)
def test_rows_are_read(tmp_path: Path, reader: Reader, name: str) -> None:
    rows = reader(write(tmp_path / name), NEEDED)

    assert [str(row["id"]) for row in rows] == ["1", "2"]
    assert [row["question"] for row in rows] == ["how many?", "which\ncolour?"]


@pytest.mark.parametrize(("reader", "name"), [*ALL, (official_files.read_xlsx, "rows.xlsx")])
def test_a_missing_file_is_named(tmp_path: Path, reader: Reader, name: str) -> None:
    with pytest.raises(LayerfuseError, match=f"there is no file .*{name}; an? .* is expected"):
        reader(tmp_path / name, NEEDED)


@pytest.mark.parametrize(("reader", "name"), [*ALL, (official_files.read_xlsx, "rows.xlsx")])
def test_an_empty_file_is_named(tmp_path: Path, reader: Reader, name: str) -> None:
    (tmp_path / name).touch()

    with pytest.raises(LayerfuseError, match=f"{name} is empty; an? .* cut off"):
        reader(tmp_path / name, NEEDED)


@pytest.mark.parametrize(("reader", "name"), ALL)
def test_a_cut_file_is_named(tmp_path: Path, reader: Reader, name: str) -> None:
    file = write(tmp_path / name)
    file.write_bytes(file.read_bytes()[:-4])

    with pytest.raises(LayerfuseError, match=f"{name}.*cut off"):
        reader(file, NEEDED)


@pytest.mark.parametrize(("reader", "name"), ALL)
def test_a_missing_column_is_named_with_its_row(tmp_path: Path, reader: Reader, name: str) -> None:
    file = write(tmp_path / name)

    with pytest.raises(LayerfuseError) as error:
        reader(file, ("id", "answer"))

    assert f"{name} has no 'answer' in row 1; the row has 'id', 'question'" in str(error.value)
    assert "needed are id, answer" in str(error.value)


def test_the_row_that_lacks_a_column_is_counted_from_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"id": 2}\n{"question": "why?"}\n')

    with pytest.raises(LayerfuseError, match="no 'id' in row 3; the row has 'question'"):
        official_files.read_json_lines(file, ("id",))


def test_a_list_may_stand_under_a_key(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": "1", "data": ROWS}))

    assert official_files.read_json(file, ("id",), key="data") == ROWS
    with pytest.raises(LayerfuseError, match="no list under 'questions'; it has 'version', 'data'"):
        official_files.read_json(file, key="questions")
    with pytest.raises(LayerfuseError, match="holds a mapping with 'version', 'data'; a list"):
        official_files.read_json(file)


def test_records_may_stand_under_their_ids(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"7": {"question": "why?"}, "9": {"question": "who?"}}')

    rows = official_files.read_json(file, ("question",), id_column="id")

    assert rows == [{"question": "why?", "id": "7"}, {"question": "who?", "id": "9"}]
    file.write_text('{"7": "why?"}')
    with pytest.raises(LayerfuseError, match="has 'why\\?' under '7'; a record is expected"):
        official_files.read_json(file, id_column="id")
    file.write_text("[1]")
    with pytest.raises(LayerfuseError, match="holds a list of 1; a mapping from ids"):
        official_files.read_json(file, id_column="id")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no records"),
        ("[1]", "has 1 as record 1; a mapping is expected"),
        ("3", "holds 3; a list of records is expected"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)

    with pytest.raises(LayerfuseError, match=message):
        official_files.read_json(file)


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json.gz"
    file.write_bytes(gzip.compress(json.dumps(ROWS).encode()))

    assert official_files.read_json(file) == ROWS


def test_cells_of_tsv_may_be_longer_than_pythons_reader_allows(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("id\timage\n1\t" + "A" * 200_000 + "\n")

    assert len(official_files.read_tsv(file)[0]["image"]) == 200_000


def test_a_row_of_tsv_with_too_few_cells_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("id\tquestion\n1\thow many?\n2\n")

    with pytest.raises(LayerfuseError, match=r"1 cells in row 2, and 2 columns \(id, question\)"):
        official_files.read_tsv(file)


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    for shard in (1, 0):
        table = pyarrow.Table.from_pylist([{"id": shard}])
        parquet.write_table(table, tmp_path / f"val-{shard:05}-of-00002.parquet")

    files = official_files.shards_like(tmp_path, "val-*.parquet")

    assert official_files.read_parquet(files) == [{"id": 0}, {"id": 1}]
    files[1].unlink()
    with pytest.raises(LayerfuseError, match="has 1 of the 2 files like val-00000-of-00002"):
        official_files.shards_like(tmp_path, "val-*.parquet")
    with pytest.raises(LayerfuseError, match="there is no test-"):
        official_files.shards_like(tmp_path, "test-*.parquet")


def test_excel_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")

    with pytest.raises(LayerfuseError, match=r"layerfuse\[excel"):
        official_files.read_xlsx(tmp_path / "rows.xlsx")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    # Columns without a name are no columns that could be lost.
    for cells in (("id", "a", None, None), (1, "x", 5, 6)):
        book.active.append(cells)
    book.save(tmp_path / "rows.xlsx")
    (tmp_path / "rows.tsv").write_text("id\ta\ta\n1\tx\ty\n")

    assert official_files.read_xlsx(tmp_path / "rows.xlsx", ("id",))[0]["a"] == "x"
    with pytest.raises(LayerfuseError, match=r"rows\.tsv has 2 columns 'a'; columns of different"):
        official_files.read_tsv(tmp_path / "rows.tsv")
    book.active["C1"] = "id"
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(LayerfuseError, match=r"rows\.xlsx has 2 columns 'id'"):
        official_files.read_xlsx(tmp_path / "rows.xlsx")


def test_formulas_of_excel_are_no_texts(tmp_path: Path) -> None:
    """A text that begins with `=` is written as a formula, whose result nobody calculated."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (("id", "option", "prediction"), (1, "=3", "= 5"), (2, "=4", "text")):
        book.active.append(cells)
    file = tmp_path / "rows.xlsx"
    book.save(file)

    assert [row["option"] for row in official_files.read_xlsx(file, ("id",))] == ["=3", "=4"]
    message = "has the formula '= 5' as 'prediction' in row 1; a text or a number is expected"
    with pytest.raises(LayerfuseError, match=message):
        official_files.read_xlsx(file, ("id", "prediction"))
    # As Excel writes what is typed behind an apostrophe.
    book.active["C2"].data_type = "s"
    book.save(file)
    assert official_files.read_xlsx(file, ("prediction",))[0]["prediction"] == "= 5"


def test_excel_is_read(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (("id", "question"), (1, "how many?"), (None, None), (2, None)):
        book.active.append(cells)
    file = tmp_path / "rows.xlsx"
    book.save(file)

    rows = official_files.read_xlsx(file, ("id",))

    assert rows == [{"id": 1, "question": "how many?"}, {"id": 2, "question": ""}]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(LayerfuseError, match="not a complete Excel file"):
        official_files.read_xlsx(file)


def test_excel_with_oddities_is_read(tmp_path: Path) -> None:
    """Spaces around the names of columns, numbers, empty lines and cells
    before, between and behind the rows."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    for cells in (
        (None, None, None),
        (" index ", "prediction", None),
        (1.0, 42, None),
        (None, None, None),
        (2, 0.5, "a note"),
        ("3", "yes", None),
    ):
        sheet.append(cells)
    # Formatted, and so written, but empty.
    for row in range(8, 40):
        sheet.cell(row=row, column=1).number_format = "0.00"
    file = tmp_path / "rows.xlsx"
    book.save(file)

    rows = official_files.read_xlsx(file, ("index", "prediction"))

    read = []
    for number, row in enumerate(rows, start=1):
        index = official_files.cell_text(file, number, row, "index")
        read.append((index, official_files.cell_text(file, number, row, "prediction")))
    assert read == [("1", "42"), ("2", "0.5"), ("3", "yes")]


def test_a_cell_that_excel_cut_is_refused(tmp_path: Path) -> None:
    """A cell holds 32,767 characters, and a picture in base64 has more: what is left is half."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    # openpyxl cuts what is longer without a word, as other tools do.
    for cells in (("index", "image", "prediction"), (1, "A" * 40000, "a" * 32766)):
        book.active.append(cells)
    file = tmp_path / "rows.xlsx"
    book.save(file)

    assert official_files.read_xlsx(file, ("index", "prediction"))[0]["prediction"] == "a" * 32766
    with pytest.raises(LayerfuseError, match="'image' in row 1 with 32,767 characters"):
        official_files.read_xlsx(file, ("index", "image"))


@pytest.mark.parametrize(
    "picture",
    [
        picture_from_bytes("a", png()),
        picture_from_base64("a", base64.b64encode(png()).decode()),
        picture_from_base64("a", "data:image/png;base64," + base64.b64encode(png()).decode()),
        picture_from_cell("a", {"bytes": png(), "path": "a.png"}),
        picture_from_cell("a", png()),
    ],
)
def test_a_picture_in_memory_opens_also_in_another_process(picture: Picture) -> None:
    assert pickle.loads(pickle.dumps(picture)).open().size == (3, 2)


def test_bad_pictures_are_named() -> None:
    with pytest.raises(LayerfuseError, match=r"row 3 is not valid base64: .* 5 characters"):
        picture_from_base64("row 3", "iVBOR")
    with pytest.raises(LayerfuseError, match="row 3 is empty"):
        picture_from_bytes("row 3", b"")
    with pytest.raises(LayerfuseError, match="row 3 is a mapping with 'path'; its encoded bytes"):
        picture_from_cell("row 3", {"path": "a.png"})


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(png())
    items: list[Item] = []
    for name in ("there.png", "gone.png", "lost.png", "gone.png"):
        picture = picture_file(tmp_path, name)
        items.append(Item(str(len(items)), (picture,), "what?", ("this",)))

    check_pictures(items[:1])
    with pytest.raises(LayerfuseError, match=r"2 of 3 pictures are missing, .*/gone\.png"):
        check_pictures([items[0], *items[1:]])


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    items = [Item("a", (), "what?", ()), Item("b", (), "what?", ()), Item("a", (), "who?", ())]

    official_files.unique_ids(items[:2])
    with pytest.raises(LayerfuseError, match=r"rows\.json: the questions 1 and 3 .* id 'a'"):
        official_files.checked_items(tmp_path / "rows.json", items)
    with pytest.raises(LayerfuseError, match="has no questions"):
        official_files.checked_items(tmp_path / "rows.json", [])


def test_cells_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"

    assert official_files.cell_text(file, 1, {"label": 2.5}, "label") == "2.5"
    assert official_files.cell_texts(file, 1, {"labels": ["a", 3]}, "labels") == ("a", "3")
    with pytest.raises(LayerfuseError, match="has None as 'label' in row 4; a text"):
        official_files.cell_text(file, 4, {"label": None}, "label")
    with pytest.raises(LayerfuseError, match="has a list of 0 as 'labels' in row 4"):
        official_files.cell_texts(file, 4, {"labels": []}, "labels")
    with pytest.raises(LayerfuseError, match="has True as 'labels' in row 4; a text"):
        official_files.cell_texts(file, 4, {"labels": ["a", True]}, "labels")


def test_the_first_file_that_is_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch()

    assert official_files.first_file(tmp_path, ("new.json", "old.json")) == tmp_path / "old.json"
    with pytest.raises(LayerfuseError, match=r"none of new\.json, newer\.json in"):
        official_files.first_file(tmp_path, ("new.json", "newer.json"))
