"""Reading, cutting and planning: every row in one shard, and the same row again when read."""

from __future__ import annotations

import json

import pytest

from convbert_deploy.bulk_scoring import lines as bulk_lines
from convbert_deploy.bulk_scoring.options import BulkOptions
from convbert_deploy.bulk_scoring.planning import find_files, make_plan
from convbert_deploy.bulk_scoring.rows import merged_kind, read_rows, request_object
from convbert_deploy.errors import InputError, OutputError

NONE = frozenset()
TRICKY = ["plain", "", "  spaces ", "caf\u00e9 \u4e2d", "a\u2028b", "\x0b", 'quo"te', "end"]


def rows_of(path, reserved=NONE, **options):
    """All rows by way of the shards, and the plan."""
    plan = make_plan(path, BulkOptions(**options), reserved)
    rows = []
    for shard in plan.shards:
        found = list(read_rows(plan.source, shard))
        assert len(found) == shard.rows
        assert shard.first == sum(
            s.rows for s in plan.shards[: shard.index] if s.file == shard.file
        )
        rows += found
    return rows, plan


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "no last"])
def test_lines_of_text(tmp_path, shard_rows, ending):
    path = tmp_path / "in.txt"
    newline = "\n" if ending == "no last" else ending
    text = newline.join(TRICKY) + ("" if ending == "no last" else newline)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows, plan = rows_of(path, shard_rows=shard_rows)
    assert [row.values["text"] for row in rows] == TRICKY
    assert len(plan.shards) == -(-len(TRICKY) // shard_rows)


@pytest.mark.parametrize("shard_rows", [1, 2, 5])
def test_csv_fields_with_line_ends_and_quotes(tmp_path, shard_rows):
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'id,text\n1,one\n2,"two\nlines, and ""quotes"""\n\n3,"three\r\n\r\nlines"\n4,four'
    )
    rows, plan = rows_of(path, shard_rows=shard_rows)
    assert [row.values["id"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[1].values["text"] == 'two\nlines, and "quotes"'
    assert rows[2].values["text"] == "three\r\n\r\nlines"
    assert plan.source.header == ("id", "text")


def test_jsonl_columns_get_the_type_that_holds_all_values(tmp_path):
    path = tmp_path / "in.jsonl"
    objects = [
        {"text": "a", "id": 1, "weight": 1, "mixed": "x", "big": 2**70, "tags": ["a"]},
        {"text": "b", "id": None, "weight": 0.5, "mixed": 3, "ok": True, "nothing": None},
    ]
    path.write_text("\n".join(map(json.dumps, objects)))
    rows, plan = rows_of(path, shard_rows=1)
    kinds = {column.name: column.kind for column in plan.source.columns}
    assert kinds == {
        "text": "string", "id": "int", "weight": "float", "mixed": "json", "big": "json",
        "tags": "json", "ok": "bool", "nothing": "string",
    }  # fmt: skip
    assert [dict(row.values) for row in rows] == objects
    assert merged_kind("bool", 1) == "json"


def test_rows_that_cannot_be_read_are_rows_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(bulk_lines, "LONGEST_LINE", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{broken\n\n[1]\n{"x": NaN}\n' + b"[" * 99 + b"\n"
        + b'{"text": "' + b"x" * 500 + b'"}\n{"text": "\xff"}\n{"text": "last"}\n'
    )  # fmt: skip
    rows, _ = rows_of(path, shard_rows=2)
    assert [row.error is None for row in rows] == [True] + [False] * 6 + [True, True]
    assert rows[-1].values == {"text": "last"}
    assert "more than" in str(rows[6].error) and "NaN" in str(rows[4].error)
    assert rows[7].values["text"] == "\udcff"  # the Scorer refuses it
    (tmp_path / "in.csv").write_text("id,text\n1,a\n2\n3,b,c\n")
    rows, _ = rows_of(tmp_path / "in.csv")
    assert [row.error is None for row in rows] == [True, False, False]
    assert "1 fields, the header 2" in str(rows[1].error)


def test_an_unclosed_quote_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bulk_lines, "LONGEST_LINE", 100)
    (tmp_path / "in.csv").write_text('text\n"open\n' + "line\n" * 1000)
    with pytest.raises(InputError, match="not CSV near byte") as caught:
        rows_of(tmp_path / "in.csv")
    assert "quote" in caught.value.hint


@pytest.mark.parametrize("shard_rows", [1, 7, 10, 64, 1000])
def test_parquet_across_row_groups(tmp_path, shard_rows):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    table = pa.table({"id": range(100), "text": [f"t{i}" for i in range(100)]})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=10)
    rows, plan = rows_of(tmp_path / "in.parquet", shard_rows=shard_rows)
    assert [row.values["text"] for row in rows] == table["text"].to_pylist()
    assert [row.batch.column("id")[row.index].as_py() for row in rows] == list(range(100))
    assert [column.kind for column in plan.source.columns] == ["arrow", "arrow"]
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable Parquet"):
        rows_of(tmp_path / "bad.parquet")


def test_a_folder_is_its_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden.txt", "_x/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n{name}\n")
    rows, plan = rows_of(tmp_path, shard_rows=2)
    assert [shard.file for shard in plan.shards] == ["a.txt", "b.txt", "deep/c.txt"]
    assert [row.values["text"] for row in rows[::2]] == ["a.txt", "b.txt", "deep/c.txt"]
    (tmp_path / "e.csv").write_text("text\na\n")
    with pytest.raises(InputError, match="several formats: csv, text"):
        find_files(tmp_path, None)
    assert find_files(tmp_path, "csv")[1][0].name == "e.csv"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"in.gz": "x"}, {}, "names no format"),
        ({"in.txt": ""}, {}, "holds no rows"),
        ({"in.csv": ""}, {}, "is empty"),
        ({"in.csv": "a,a\n1,2\n"}, {}, "two columns called a"),
        ({"in.csv": "a,b\n1,2\n"}, {"keep": ("c",)}, "no column c to keep: it has a, b"),
        ({"in.csv": "row,input_row\n1,2\n"}, {}, "would be called input_row"),
        ({}, {}, "does not exist"),
    ],
)
def test_inputs_that_make_no_plan(tmp_path, files, options, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / next(iter(files), "absent")
    with pytest.raises((InputError, OutputError), match=message):
        make_plan(path, BulkOptions(**options), frozenset({"row"}))


def test_files_of_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,a\n")
    (tmp_path / "b.csv").write_text("text,id\na,1\n")
    with pytest.raises(InputError, match=r"b\.csv has the columns text, id"):
        make_plan(tmp_path, BulkOptions(), NONE)


def test_columns_are_kept_renamed_where_the_answer_has_the_name(tmp_path):
    (tmp_path / "in.csv").write_text("id,label,text\n1,x,a\n")
    _, plan = rows_of(tmp_path / "in.csv", reserved=frozenset({"label"}), keep=("label", "id"))
    assert [(c.name, c.output) for c in plan.source.columns] == [
        ("label", "input_label"),
        ("id", "id"),
    ]


def test_a_changed_input_is_not_read(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("a\nb\n")
    _, plan = rows_of(path)
    path.write_text("a\nb\nc\n")
    with pytest.raises(InputError, match="was changed since"):
        read_rows(plan.source, plan.shards[0])


def test_requests_from_csv_cells(tmp_path):
    (tmp_path / "in.csv").write_text(
        'body,text_pair,choices\na,,"[""x"", ""y""]"\nb,c,x\n', encoding="utf-8"
    )
    rows, plan = rows_of(tmp_path / "in.csv", text_column="body")
    found = request_object(plan.source, rows[0].values)
    assert (found["text"], found["text_pair"], found["choices"]) == ("a", None, ["x", "y"])
    with pytest.raises(InputError, match="choices is not a JSON list"):
        request_object(plan.source, rows[1].values)


@pytest.mark.parametrize(
    "options", [{"shard_rows": 0}, {"workers": 0}, {"format": "xml"}, {"output_format": "csv"}]
)
def test_options_out_of_range(options):
    with pytest.raises(InputError):
        BulkOptions(**options)


def test_local_and_a_cluster_exclude_each_other():
    with pytest.raises(InputError, match="exclude each other"):
        BulkOptions(local=True, address="auto")
