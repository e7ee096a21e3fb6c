"""``calibrate`` and ``build-engine --data`` as typed: exit codes, streams, files, hints."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import pytest
from click.testing import CliRunner

from convbert_deploy.cli import main
from convbert_deploy.engine import Engine
from convbert_deploy.graph import latest_graph, read_info, sha256_of_graph
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import sha256_of_file

pytest_plugins = ["quantized_sample"]


@pytest.fixture
def folder(classifier_graph, token_rows, tmp_path, monkeypatch) -> pathlib.Path:
    """The current folder, with an exported graph and rows of ids."""
    shutil.copyfile(classifier_graph.path, tmp_path / "model.onnx")
    shutil.copyfile(token_rows, tmp_path / "rows.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def error_of(result, code: int = 3) -> tuple[str, str]:
    """(error, hint) of a failed command, whose stdout is empty."""
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.output
    lines = result.stderr.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    return error, next((line for line in lines if line.startswith("hint: ")), "")


CALIBRATE = ("calibrate", "model.onnx", "--data", "rows.npz", "--threads", "1")
BUILD = ("build-engine", "model.onnx", "--backend", "onnxruntime")


def test_json_is_one_object_on_stdout(folder) -> None:
    result = call(*CALIBRATE, "--int8", "--smoothquant", "off", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["kind"] == "calibration" and record["precision"] == "int8"
    assert (record["graph"], record["table"]) == (
        "model.int8.onnx",
        "model.int8.calibration.json",
    )
    assert record["bytes"] == (folder / "model.int8.onnx").stat().st_size
    assert len(record["quantized"]) == 10
    assert set(record["losses"]) == {"metric_drop", "agreement", "mean_error", "max_error", "kl"}
    assert "collecting ranges: 24 of 24" in result.stderr
    info = read_info(folder / "model.int8.onnx")
    assert info.calibration["losses"] == record["losses"]
    assert str(folder) not in json.dumps(info.to_json()), "no path of this machine"


def test_text_names_what_is_lost_and_what_stays_high(folder) -> None:
    result = call(*CALIBRATE, "--int8", "--smoothquant", "off", "--budget", "mean error <= 0.003")
    assert result.exit_code == 0, result.output
    assert "wrote model.int8.onnx: int8" in result.stdout
    assert "against the fp32 graph: agreement" in result.stdout
    assert "budget mean error <= 0.003: met with" in result.stdout
    assert "their price:" in result.stdout
    assert "most sensitive, quantized alone" in result.stdout
    high = read_info(folder / "model.int8.onnx").calibration["high"]
    assert high and all(f"  {name}" in result.stdout for name in high)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions(folder, precision) -> None:
    result = call(*CALIBRATE, f"--{precision}", "-o", f"sub/half.{precision}.onnx")
    assert result.exit_code == 0, result.output
    assert f"wrote sub/half.{precision}.onnx: {precision}" in result.stdout.replace(os.sep, "/")
    assert read_info(folder / "sub" / f"half.{precision}.onnx").precision == precision


@pytest.mark.parametrize(
    "arguments",
    [
        CALIBRATE,
        (*CALIBRATE, "--fp32"),
        ("calibrate", "model.onnx", "--int8"),
        (*CALIBRATE, "--int8", "--method", "median"),
        (*CALIBRATE, "--int8", "--samples", "0"),
        (*BUILD, "--data", "rows.npz"),
        (*BUILD, "--data", "rows.npz", "--fp32"),
        (*BUILD, "--int8", "--budget", "mean error <= 1"),
    ],
)
def test_usage_errors_exit_2(folder, arguments) -> None:
    before = sorted(folder.iterdir())
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Usage: " in result.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "nowhere.onnx", "--data", "rows.npz", "--int8"), "nowhere.onnx does not"),
        (("calibrate", "model.onnx", "--data", "no.npz", "--int8"), "no.npz does not exist"),
        (("calibrate", "model.onnx", "--data", "model.onnx", "--int8"), "is a .onnx file"),
        ((*CALIBRATE, "--int8", "--smoothquant", "1.5"), "expected auto, off or 0.0 to 1.0"),
        ((*CALIBRATE, "--int8", "--smoothquant", "much"), "smoothquant 'much'"),
        ((*CALIBRATE, "--int8", "--budget", "error < 1"), "cannot read the budget clause"),
        ((*CALIBRATE, "--int8", "--table", "no.json"), "no.json does not exist"),
        ((*CALIBRATE, "--int8", "--table", "rows.npz"), "is no calibration table"),
        ((*CALIBRATE, "--int8", "--fp8-attention"), "fp8 attention in an int8 graph"),
        ((*CALIBRATE, "--fp16", "--budget", "kl <= 1"), "fp16 has none"),
        ((*CALIBRATE, "--int8", "--percentile", "101"), "percentile 101"),
    ],
)
def test_mistakes_are_one_line_and_exit_3(folder, arguments, message) -> None:
    before = sorted(folder.iterdir())
    error, _ = error_of(call(*arguments))
    assert message in error
    assert sorted(folder.iterdir()) == before


def test_an_impossible_budget_exits_3(folder) -> None:
    before = sorted(folder.iterdir())
    result = call(*CALIBRATE, "--int8", "--smoothquant", "off", "--budget", "max error <= 0")
    error, hint = error_of(result)
    assert "no layer can be quantized within the budget max error <= 0" in error
    assert "--fp16" in hint
    assert sorted(folder.iterdir()) == before


def test_a_metric_budget_on_texts_without_labels_exits_3(
    tagger_graph, sample_texts, tmp_path
) -> None:
    pytest.importorskip("tokenizers")
    bare = tmp_path / "bare.jsonl"
    lines = sample_texts.read_text().splitlines()[:2]
    bare.write_text("\n".join(json.dumps({"words": json.loads(line)["words"]}) for line in lines))
    out = tmp_path / "out.onnx"
    arguments = ("--int8", "--smoothquant", "off", "--budget", "metric drop <= 0.3", "-o", out)
    error, hint = error_of(call("calibrate", tagger_graph, "--data", bare, *arguments))
    assert "metric drop" in error and "labels" in error + hint
    assert list(tmp_path.iterdir()) == [bare]


def test_one_step_calibrates_and_builds(folder, classifier) -> None:
    result = call(*BUILD, "--int8", "--data", "rows.npz", "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    graph = folder / "model.int8.onnx"
    engine = Engine.load(folder / "model.int8.engine")
    assert engine.manifest.precision is Precision.INT8
    assert engine.manifest.target["passes"] == {"EncoderLayers": "2 of 2"}
    assert "int8 products (a step for each token)" in engine.manifest.target["arithmetic"]
    assert manifest["calibration"] == read_info(graph).calibration
    assert manifest["golden_max_abs"] > 0, "the golden request was checked"
    kinds = [(link.kind, link.sha256) for link in engine.manifest.chain]
    assert kinds == [
        ("checkpoint", classifier.digest()),
        ("graph", sha256_of_graph(folder / "model.onnx")),
        ("graph", sha256_of_graph(graph)),
    ]
    table = folder / "model.int8.calibration.json"
    assert manifest["calibration"]["table_sha256"] == sha256_of_file(table)


def test_a_calibrated_graph_needs_no_flag_and_takes_no_other(folder) -> None:
    assert call(*CALIBRATE, "--int8", "--smoothquant", "off").exit_code == 0
    built = call("build-engine", "model.int8.onnx", "--backend", "onnxruntime")
    assert built.exit_code == 0, built.output
    assert "wrote model.int8.engine: onnxruntime-cpu int8" in built.stdout
    assert Engine.load(folder / "model.int8.engine").manifest.precision is Precision.INT8
    again = call("build-engine", "model.int8.onnx", "--backend", "onnxruntime", "--int8")
    assert again.exit_code == 0
    error, hint = error_of(call("build-engine", "model.int8.onnx", "--fp16"))
    assert "model.int8.onnx was calibrated as int8, not fp16" in error
    assert "leave out --fp16" in hint
    error, _ = error_of(call("build-engine", "model.int8.onnx", "--int8", "--data", "rows.npz"))
    assert "model.int8.onnx is int8 already" in error


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bits_of_an_fp32_graph_need_data(folder, precision) -> None:
    error, hint = error_of(call(*BUILD, f"--{precision}", "--no-plugin"))
    assert f"{precision} needs ranges, and model.onnx is an fp32 graph" in error
    assert f"build-engine --{precision} --data" in hint
    assert not (folder / f"model.{precision}.engine").exists()


def test_int8_without_data_measures_each_token(folder) -> None:
    result = call(*BUILD, "--int8")
    assert result.exit_code == 0, result.output
    engine = Engine.load(folder / "model.int8.engine")
    assert engine.manifest.calibration is None and engine.manifest.precision is Precision.INT8
    error, hint = error_of(call(*BUILD, "--int8", "--static-activations"))
    assert "static activations" in error and "calibrate" in hint


@pytest.mark.parametrize("precision", ["fp8", "fp16", "bf16"])
def test_data_is_not_measured_for_an_engine_that_this_cpu_cannot_be(folder, precision) -> None:
    before = sorted(folder.iterdir())
    result = call(*BUILD, f"--{precision}", "--data", "rows.npz")
    assert result.exit_code in (2, 3), result.output
    assert "Traceback" not in result.output and "collecting" not in result.stderr
    assert sorted(folder.iterdir()) == before


def test_the_newest_export_is_no_calibrated_graph(folder) -> None:
    assert call(*CALIBRATE, "--int8", "--smoothquant", "off").exit_code == 0
    assert call(*CALIBRATE, "--fp16").exit_code == 0
    os.utime(folder / "model.onnx", (1, 1))
    assert latest_graph(folder).name == "model.onnx"
    built = call("build-engine", "--backend", "onnxruntime")
    assert built.exit_code == 0, built.output
    assert "the newest export here is model.onnx" in built.stderr
    assert (folder / "model.fp32.engine").is_dir()


def test_inspect_shows_the_calibration(folder) -> None:
    assert call(*CALIBRATE, "--int8", "--smoothquant", "off").exit_code == 0
    description = json.loads(call("inspect", "model.int8.onnx", "--json").stdout)
    assert description["kind"] == "graph" and description["precision"] == "int8"


def test_verify_and_run_take_an_int8_engine(
    int8_engine, sample_path, sample_texts, tmp_path
) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("sklearn")
    budget = "metric drop <= 0.3, agreement >= 99%, mean error <= 0.03"
    judged = ("--against", sample_path, "--limit", 30, "--budget", budget, "--json", "--threads", 1)
    result = call("evaluate", int8_engine.path, "--data", sample_texts, *judged)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] and report["distance"]["max_error"] > 1e-3, "it is not the fp32 engine"
    tight = (
        "--against",
        sample_path,
        "--limit",
        5,
        "--budget",
        "mean error <= 0.0001",
        "--threads",
        1,
    )
    assert call("evaluate", int8_engine.path, "--data", sample_texts, *tight).exit_code == 1
    answer = json.loads(call("run", int8_engine.path, "--text", "The cat sat .").stdout)
    assert [word["label"] for word in answer["words"]][:3] == ["DET", "NOUN", "VERB"]
