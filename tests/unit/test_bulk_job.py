"""A job in this process: what is written, what is done again, what is refused."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from convbert_deploy.architecture import Task
from convbert_deploy.bulk_scoring import command, processes
from convbert_deploy.bulk_scoring import job as bulk_job
from convbert_deploy.bulk_scoring.cluster import ShardActor, check_reachable, check_room
from convbert_deploy.bulk_scoring.folder import BulkFolder
from convbert_deploy.bulk_scoring.job import bulk, local_sizes
from convbert_deploy.bulk_scoring.options import FORMATS, BulkOptions
from convbert_deploy.bulk_scoring.shard_scoring import ShardScorer
from convbert_deploy.errors import (
    EngineError,
    InputError,
    MissingDependencyError,
    OutputError,
)
from convbert_deploy.serving.answering import run

import factories

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")
TEXTS = [
    "A fine day.",
    "It rained all of the long day in June.",
    "So good.",
    "not so good but long",
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory, sample_path):
    """A tiny classifier with realistic weights, by padding."""
    from convbert_deploy.build import BuildOptions, build_engine
    from convbert_deploy.checkpoint import Checkpoint, CheckpointOptions
    from convbert_deploy.exporting import ExportOptions, export
    from convbert_deploy.graph import Graph

    folder = tmp_path_factory.mktemp("engines")
    model = factories.realistic_model("tiny", Task.SEQUENCE_CLASSIFICATION, vocab_size=9000)
    torch.save(model.state_dict(), folder / "m.pt")
    options = CheckpointOptions(tokenizer=sample_path, task=Task.SEQUENCE_CLASSIFICATION)
    checkpoint = Checkpoint.load(folder / "m.pt", options)
    found = {}
    for padding in ("masked", "hf"):
        export(checkpoint, folder / "m.onnx", ExportOptions(padding=padding, check=False))
        graph = Graph.load(folder / "m.onnx")
        path = folder / f"{padding}.engine"
        found[padding] = build_engine(graph, path, BuildOptions(backend="onnxruntime"))
    return found


@pytest.fixture
def here(monkeypatch):
    """Scores in this process; ``here.scored`` are the shards, ``here.fail_at`` one that fails."""

    class Here:
        fail_at = None

        def __init__(self):
            self.scored = []

        def __call__(self, job, shards, workers, note):
            with ShardScorer(job) as scorer:
                for shard in shards:
                    if shard.index == self.fail_at:
                        raise OutputError("no space")
                    self.scored.append(shard.index)
                    yield scorer.score(shard)

    stand_in = Here()
    monkeypatch.setattr(processes, "score_in_processes", stand_in)
    return stand_in


def options(**changes):
    return BulkOptions(**({"local": True, "output_format": "jsonl", "shard_rows": 2} | changes))


def lines_of(out):
    parts = sorted(out.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "in.csv"
    cells = "\n".join(f'{i},x,"{text}"' for i, text in enumerate([*TEXTS, "", "broken"]))
    path.write_text(f"id,label,text\n{cells},too many\n")
    return path


@pytest.mark.parametrize("padding", ["masked", "hf"])
def test_answers_are_those_of_each_text_alone(here, engines, tmp_path, padding):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS * 5))
    summary = bulk(tmp_path / "in.txt", tmp_path / "out", engines[padding].path, options())
    assert (summary.rows, summary.errors, summary.shards) == (20, 0, 10)
    found = lines_of(tmp_path / "out")
    assert [line["row"] for line in found] == list(range(20))
    for line in found:
        alone = next(run(engines[padding], [line["text"]]))
        assert line["answer"]["scores"] == pytest.approx(alone["scores"], abs=1e-6)
        assert (line["label"], line["file"]) == (alone["label"], "in.txt")


def test_bad_rows_have_errors_and_keep_their_columns(here, engines, tmp_path, csv_file):
    summary = bulk(csv_file, tmp_path / "out", engines["masked"].path, options())
    assert (summary.rows, summary.errors) == (6, 2)
    found = lines_of(tmp_path / "out")
    assert [line["id"] for line in found] == list("012345")
    assert all(line["input_label"] == "x" for line in found)
    assert ["error" in line for line in found] == [False] * 4 + [True] * 2
    assert "null" in found[4]["error"] and "4 fields" in found[5]["error"]
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert [part["rows"] for part in success["parts"]] == [2, 2, 2] and success["errors"] == 2


def test_parquet_keeps_types_of_the_input(here, engines, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import datetime

    days = [datetime.date(2020, 1, i + 1) for i in range(4)]
    table = pa.table({"body": TEXTS, "day": days, "score": [[1, 2], None, [], [3]]})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    chosen = options(output_format="parquet", text_column="body", shard_rows=3)
    bulk(tmp_path / "in.parquet", tmp_path / "out", engines["masked"].path, chosen)
    found = pa.concat_tables(
        [parquet.read_table(path) for path in sorted((tmp_path / "out").glob("part-*"))]
    )
    assert found.schema.names == [
        "file", "row", "body", "day", "input_score", "label", "score", "answer", "error",
    ]  # fmt: skip
    assert found["day"].to_pylist() == days
    assert found["input_score"].to_pylist() == table["score"].to_pylist()
    assert found["score"].to_pylist() == [
        json.loads(answer)["score"] for answer in found["answer"].to_pylist()
    ]
    bulk(tmp_path / "in.parquet", tmp_path / "lines", engines["masked"].path,
         options(text_column="body"))  # fmt: skip
    assert lines_of(tmp_path / "lines")[3]["day"] == "2020-01-04"


def test_parquet_of_objects_with_unequal_shards(here, engines, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in.jsonl").write_bytes(
        b'{"text": "good", "id": 1}\n{"text": "bad", "id": 1.5, "tag": {"a": 1}}\n'
        b'{"text": "so \\udcff", "id": 7}\n{broken\n'
    )
    chosen = options(output_format="parquet", shard_rows=1)
    bulk(tmp_path / "in.jsonl", tmp_path / "out", engines["masked"].path, chosen)
    parts = sorted((tmp_path / "out").glob("part-*"))
    found = pa.concat_tables([parquet.read_table(path) for path in parts]).to_pylist()
    assert [row["id"] for row in found] == [1.0, 1.5, 7.0, None]
    assert [row["tag"] for row in found] == [None, '{"a": 1}', None, None]
    assert [row["error"] is None for row in found] == [True, True, False, False]
    assert [row["text"] for row in found] == ["good", "bad", "so ?", None]


def test_a_job_goes_on_with_what_is_missing(here, engines, tmp_path, csv_file):
    out = tmp_path / "out"
    here.fail_at = 1
    with pytest.raises(OutputError, match="no space"):
        bulk(csv_file, out, engines["masked"].path, options())
    assert here.scored == [0] and not (out / "_SUCCESS").exists()
    (out / ".part-00001.jsonl.abc").write_text("half")
    (out / "part-00002.jsonl").write_text("a part without its record")
    here.fail_at = None
    summary = bulk(csv_file, out, engines["masked"].path, options())
    assert here.scored == [0, 1, 2] and summary.earlier_shards == 1
    assert [line["row"] for line in lines_of(out)] == list(range(6))
    assert not list(out.glob(".part*"))
    (out / "part-00001.jsonl").write_text("cut")  # a part that lost bytes is done again
    here.fail_at = 1
    with pytest.raises(OutputError, match="no space"):
        bulk(csv_file, out, engines["masked"].path, options())
    assert not (out / "_SUCCESS").exists()
    here.fail_at = None
    bulk(csv_file, out, engines["masked"].path, options())
    assert here.scored == [0, 1, 2, 1] and (out / "_SUCCESS").exists()
    assert bulk(csv_file, out, engines["masked"].path, options()).workers == 0


def test_another_job_is_refused_its_folder(here, engines, tmp_path, csv_file):
    out = tmp_path / "out"
    bulk(csv_file, out, engines["masked"].path, options())
    with pytest.raises(OutputError, match="with another engine") as caught:
        bulk(csv_file, out, engines["hf"].path, options())
    assert "another folder" in caught.value.hint
    with pytest.raises(OutputError, match="with other options.*shard_rows"):
        bulk(csv_file, out, engines["masked"].path, options(shard_rows=3))
    csv_file.write_text(csv_file.read_text() + "6,x,more\n")
    with pytest.raises(OutputError, match="on another input"):
        bulk(csv_file, out, engines["masked"].path, options())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="holds mine.txt and no _job.json"):
        bulk(csv_file, tmp_path / "full", engines["masked"].path, options())
    with pytest.raises(OutputError, match="lie in each other"):
        bulk(tmp_path, out, engines["masked"].path, options())


def test_two_jobs_do_not_write_one_folder(here, engines, tmp_path, csv_file):
    folder = BulkFolder(tmp_path / "out", "jsonl")
    with folder.locked(), pytest.raises(OutputError, match="another bulk job writes"):
        bulk(csv_file, tmp_path / "out", engines["masked"].path, options())


def test_columns_that_make_no_request_are_refused_at_once(here, engines, tmp_path):
    (tmp_path / "in.csv").write_text("id,body\n1,a\n")
    with pytest.raises(
        InputError, match="no request can be made of the columns id, body"
    ) as caught:
        bulk(tmp_path / "in.csv", tmp_path / "out", engines["masked"].path, options())
    assert "--text-column" in caught.value.hint
    chosen = options(text_column="body")
    assert bulk(tmp_path / "in.csv", tmp_path / "out", engines["masked"].path, chosen).errors == 0


def test_an_engine_replaced_meanwhile_is_not_used(engines, tmp_path, csv_file, monkeypatch):
    def replaced(job, shards, workers, note):
        import dataclasses

        with ShardScorer(dataclasses.replace(job, engine=str(engines["hf"].path))):
            yield from ()

    monkeypatch.setattr(processes, "score_in_processes", replaced)
    with pytest.raises(EngineError, match="was replaced since"):
        bulk(csv_file, tmp_path / "out", engines["masked"].path, options())


#: called as ``kill(job, pipe)``: ends the process with a TypeError, and is importable in any process
ends_at_once = os.kill


def test_a_shard_that_ends_its_process_every_time_ends_the_job(
    engines, tmp_path, csv_file, monkeypatch
):
    real, notes = processes.score_in_processes, []
    monkeypatch.setattr(
        processes,
        "score_in_processes",
        lambda job, shards, workers, note: real(job, shards, workers, note, target=ends_at_once),
    )
    with pytest.raises(EngineError, match=r"shard \d .* ended its process 3 times"):
        bulk(csv_file, tmp_path / "out", engines["masked"].path, options(workers=1), notes.append)
    assert sum("is done again" in note for note in notes) == 2


def test_a_workers_error_comes_out_as_it_was():
    error = processes.remote_error("MissingDependencyError", "no pyarrow", "pip install it")
    assert isinstance(error, MissingDependencyError)
    assert (str(error), error.hint) == ("no pyarrow", "pip install it")


def test_actors_that_would_wait_for_ever_are_refused():
    assert check_room(None, 1, 0, [{"CPU": 8.0}]) == 7
    assert check_room(3, 2, 0, [{"CPU": 4.0}, {"CPU": 3.0}]) == 3
    with pytest.raises(InputError, match="would wait for ever") as caught:
        check_room(4, 2, 0, [{"CPU": 8.0}])
    assert caught.value.hint == "--workers 3"
    with pytest.raises(InputError, match="1 nodes with 1 CPUs") as caught:
        check_room(None, 1, 0, [{"CPU": 1.0}])
    assert "--local" in caught.value.hint
    with pytest.raises(InputError, match="3 CPUs each"):  # enough together, and on no node
        check_room(1, 3, 0, [{"CPU": 2.0}] * 4)
    with pytest.raises(InputError, match="1 GPUs each") as caught:
        check_room(2, 1, 1, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}])
    assert caught.value.hint == "--workers 1"


def test_an_address_where_nothing_listens_is_refused_at_once():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(InputError, match="no Ray cluster at ray://127"):
            check_reachable(f"ray://127.0.0.1:{taken.getsockname()[1]}")
    check_reachable("auto")


def test_attempts_at_a_shard_are_counted_until_it_is_finished(tmp_path):
    folder = BulkFolder(tmp_path, "jsonl")
    assert [folder.begin_attempt(5) for _ in range(3)] == [1, 2, 3]
    folder.mark_finished(5, {})
    assert folder.begin_attempt(5) == 1


def test_sizes_of_a_local_job():
    assert local_sizes(BulkOptions(), 16, 0) == (4, 4)
    assert local_sizes(BulkOptions(), 2, 0) == (2, 1)
    assert local_sizes(BulkOptions(workers=8), 2, 0) == (8, 1)
    assert local_sizes(BulkOptions(), 16, 1) == (1, 16)


def test_without_ray_a_job_is_local(monkeypatch):
    monkeypatch.setattr(bulk_job, "_installed", lambda package: package != "ray")
    assert bulk_job.is_local(BulkOptions())
    assert not bulk_job.is_local(BulkOptions(address="auto"))
    with pytest.raises(MissingDependencyError, match="ray"):
        bulk_job.check_installed(BulkOptions(address="auto"))


def test_a_shard_that_ends_its_actor_every_time_is_reported(engines, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    reports = []

    def on_actor(job, shards, workers, note):
        actor = ShardActor(job)
        folder = BulkFolder(tmp_path / "out", "jsonl")
        for _ in range(processes.ATTEMPTS):  # as actors that died in it have left it
            folder.begin_attempt(1)
        batch = {"shard": [json.dumps(shard.to_json()) for shard in shards]}
        reports.extend(json.loads(report) for report in actor(batch)["report"])
        yield from ()

    monkeypatch.setattr(processes, "score_in_processes", on_actor)
    with pytest.raises(KeyError):  # the stand-in gives no results
        bulk(tmp_path / "in.txt", tmp_path / "out", engines["masked"].path, options())
    assert reports[0]["rows"] == 2
    name, message, _ = reports[1]["failed"]
    assert name == "EngineError" and "ended its actor 3 times" in message


def test_the_command_prints_what_became_of_the_job(here, engines, tmp_path, csv_file):
    words = [str(csv_file), "-o", str(tmp_path / "out"), "--engine", str(engines["hf"].path)]
    words += ["--local", "--output-format", "jsonl", "--keep", "id"]
    result = CliRunner().invoke(command.bulk, words)
    assert result.exit_code == 0, result.output
    assert "6 rows in 1 parts, 2 with an error" in result.stdout
    assert "export --padding masked" in result.stderr and "1 of 1 shards" in result.stderr
    assert [set(line) - {"error"} for line in lines_of(tmp_path / "out")][4] == {
        "file", "row", "id",
    }  # fmt: skip
    again = CliRunner().invoke(command.bulk, [*words, "--json"])
    assert json.loads(again.stdout)["earlier_shards"] == 1
    (tmp_path / "bad.jsonl").write_text("{}\n{}\n")
    words[0], words[2] = str(tmp_path / "bad.jsonl"), str(tmp_path / "none")
    assert CliRunner().invoke(command.bulk, words[:-2]).exit_code == 3


def test_the_command_offers_every_format():
    offered = next(option for option in command.bulk.params if option.name == "format")
    assert tuple(offered.type.choices) == tuple(FORMATS)
