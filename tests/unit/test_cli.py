"""The command line as a user meets it: exit codes, streams, defaults, one-line errors."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from click.testing import CliRunner

from convbert_deploy.cli import main


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **kwargs):
        return CliRunner().invoke(main, [str(a) for a in arguments], **kwargs)

    return run


@pytest.fixture(scope="module")
def built(classifier, tmp_path_factory):
    """A folder in which ``export`` and ``build-engine`` have run with default names."""
    folder = tmp_path_factory.mktemp("work")
    torch.save(dict(classifier.tensors), folder / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exported = CliRunner().invoke(main, ["export", "--ckpt", "model.pt"])
        assert exported.exit_code == 0, exported.output
        assert "2 layers" in exported.stderr, "the architecture is printed"
        built = CliRunner().invoke(main, ["build-engine", "--fp16"])
        assert built.exit_code == 0, built.output
        assert "newest export here is model.onnx" in built.stderr
    return folder


def test_defaults_chain_from_checkpoint_to_engine(built):
    assert (built / "model.onnx").is_file()
    assert (built / "model.fp16.engine" / "manifest.json").is_file()


def test_verify_exit_codes(built, call, save_checkpoint):
    engine = built / "model.fp16.engine"
    good = call("verify", engine, "--against", built / "model.pt", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["passed"]
    torch.save(dict(save_checkpoint(seed=3).tensors), "other.pt")
    wrong = call("verify", engine, "--against", "other.pt")
    assert wrong.exit_code == 3
    assert "was built from" in wrong.stderr


def test_bench_writes_json_and_markdown(built, call, tmp_path):
    result = call(
        "bench",
        built / "model.fp16.engine",
        "--baseline",
        built / "model.pt",
        "--batch",
        "1,2",
        "--seq",
        "8",
        "--min-time",
        "0",
        "--max-runs",
        "3",
        "--no-ceiling",
        "--json",
        "b.json",
        "--markdown",
        "-",
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "b.json").read_text())
    assert {(m["candidate"], m["batch"]) for m in report["measurements"]} == {
        (name, batch) for name in ("eager fp32", "onnxruntime-cpu fp16") for batch in (1, 2)
    }
    assert "|" in result.stdout


def test_inspect_knows_all_three_kinds(built, call, tmp_path):
    for name, kind in (
        ("model.pt", "checkpoint"),
        ("model.onnx", "graph"),
        ("model.fp16.engine", "engine"),
    ):
        result = call("inspect", built / name, "--json")
        assert json.loads(result.stdout)["kind"] == kind
    torch.save({"bert.weight": torch.zeros(2, 3)}, "bert.pt")
    other = json.loads(call("inspect", "bert.pt", "--json").stdout)
    assert other["kind"] == "weights"
    assert other["first_tensors"] == {"bert.weight": [2, 3]}


def test_doctor_lists_checks(call):
    result = call("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)


BAD_COMMANDS = {
    "no checkpoint": ["export", "--ckpt", "nowhere.pt"],
    "no graph": ["build-engine"],
    "missing graph": ["build-engine", "nowhere.onnx"],
    "bad shapes": ["build-engine", "nowhere.onnx", "--shapes", "batch=8:1"],
    "no engine": ["verify", "nowhere.engine", "--against", "nowhere.pt"],
    "no engine to bench": ["bench", "nowhere.engine"],
    "no engine to run": ["run", "nowhere.engine", "--text", "x"],
    "nothing to inspect": ["inspect", "nowhere"],
}


@pytest.mark.parametrize("case", sorted(BAD_COMMANDS))
def test_user_errors_are_one_line_and_exit_3(case, call, tmp_path):
    result = call(*BAD_COMMANDS[case])
    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["export"],
        ["export", "--ckpt", "x", "--task", "poetry"],
        ["bench", "e", "--batch", "one"],
    ],
)
def test_usage_errors_exit_2(arguments, call):
    assert call(*arguments).exit_code == 2


def test_our_bugs_keep_their_traceback(call, monkeypatch):
    monkeypatch.setattr("convbert_deploy.inspection.inspect", lambda path: 1 / 0)
    assert isinstance(call("inspect", ".").exception, ZeroDivisionError)


def test_paths_of_the_machine_are_not_recorded(built):
    manifest = (built / "model.fp16.engine" / "manifest.json").read_text()
    assert str(pathlib.Path.home()) not in manifest
    assert str(built) not in manifest
