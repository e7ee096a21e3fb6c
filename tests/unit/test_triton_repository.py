"""What packaging writes and refuses, without a server."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from click.testing import CliRunner

from convbert_deploy.architecture import Task
from convbert_deploy.command_line import Cli
from convbert_deploy.engine import Engine
from convbert_deploy.errors import EngineError, InputError, OutputError
from convbert_deploy.provenance import sha256_of_file
from convbert_deploy.serving import answering
from convbert_deploy.triton import repository as repository_module
from convbert_deploy.triton.command import package as package_command
from convbert_deploy.triton.config import warm_ups
from convbert_deploy.triton.repository import (
    REPOSITORY_MANIFEST,
    Repository,
    TritonOptions,
    package_triton,
)

import triton_engines

pytest.importorskip("tokenizers")


@pytest.fixture
def engine(tmp_path: pathlib.Path) -> Engine:
    return triton_engines.on_disk(tmp_path, padding="masked")


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the engine is said to answer; its model is no model."""
    given = [{"label": "good", "score": 0.5}]
    monkeypatch.setattr(answering, "run", lambda engine, lines: iter(given))
    return given


@pytest.fixture
def library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    path = tmp_path / "lib" / "libours.so"
    path.parent.mkdir()
    path.write_text("code")
    monkeypatch.setattr(repository_module, "tensorrt_library", lambda: path)
    monkeypatch.setattr(repository_module, "ort_library", lambda: path)
    return path


def tree(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_repository_of_a_cpu_engine(engine, tmp_path):
    target = tmp_path / "out" / "repository"
    made = package_triton(engine, target)
    assert (made.name, made.engine_name) == ("tiny_fp32", "tiny_fp32_engine")
    assert made.plugins is None and made.server_arguments == ()
    copied = {f"tiny_fp32_engine/1/engine/{name}" for name in tree(engine.path)}
    described = {
        name.replace("_engine/", "/") for name in copied if not name.endswith("model.onnx")
    }
    warm = {
        f"tiny_fp32_engine/warmup/{warm.file(name)}"
        for warm in warm_ups(engine.manifest)
        for name in engine.golden.inputs
    }
    own = {
        f"{model}/{file}"
        for model in (made.name, made.engine_name)
        for file in ("config.pbtxt", "1/model.py")
    }
    assert tree(target) == copied | described | warm | own | {REPOSITORY_MANIFEST}
    assert Engine.load(target / "tiny_fp32_engine/1/engine").manifest == engine.manifest
    assert sorted(path.name for path in target.parent.iterdir()) == ["repository"]


def test_its_manifest_has_every_hash_the_chain_and_the_golden_requests(engine, tmp_path, answers):
    target = tmp_path / "repository"
    package_triton(engine, target, TritonOptions(command="convbert-deploy package"))
    loaded = Repository.load(target).manifest
    assert set(loaded["files"]) == tree(target) - {REPOSITORY_MANIFEST}
    assert all(sha256_of_file(target / name) == found for name, found in loaded["files"].items())
    assert loaded["chain"] == [origin.to_json() for origin in engine.manifest.chain]
    golden = loaded["golden"]
    assert golden["inputs"] == engine.golden.inputs and 0 < golden["max_abs"] < 1e-3
    assert loaded["golden_text"]["answer"] == answers[0]
    assert "text" in loaded["golden_text"]["request"]
    assert (loaded["task"], loaded["padding"], loaded["command"]) == (
        "sequence-classification",
        "masked",
        "convbert-deploy package",
    )


def test_every_file_is_held_to_its_hash(engine, tmp_path):
    target = tmp_path / "repository"
    package_triton(engine, target)
    (target / "tiny_fp32/config.pbtxt").write_text("name: 'other'")
    with pytest.raises(EngineError, match=r"damaged: tiny_fp32/config\.pbtxt"):
        Repository.load(target)
    for content in ("{", '{"schema": 1}', "[]"):
        (target / REPOSITORY_MANIFEST).write_text(content)
        with pytest.raises(EngineError, match="not a model repository"):
            Repository.load(target)


def test_warm_up_files_hold_one_row_that_the_engine_takes(tmp_path):
    from convbert_deploy.serving.requests import validated_batch

    engine = triton_engines.on_disk(tmp_path, Task.MULTIPLE_CHOICE, padding="masked")
    made = package_triton(engine, tmp_path / "repository")
    for warm in warm_ups(engine.manifest):
        row = {
            name: np.fromfile(made.path / made.engine_name / "warmup" / warm.file(name), np.int64)
            for name in engine.golden.inputs
        }
        validated_batch(
            {name: array.reshape(1, *warm.shape) for name, array in row.items()}, engine.limits()
        )


@pytest.mark.parametrize("task", list(Task))
def test_the_golden_text_is_a_request_of_the_task(task, tmp_path):
    from convbert_deploy.serving.requests import request_from_json

    engine = triton_engines.on_disk(tmp_path, task, padding="masked")
    made = package_triton(engine, tmp_path / "repository")
    request_from_json(task, made.manifest["golden_text"]["request"])


def test_models_are_python_that_compiles(engine, tmp_path):
    made = package_triton(engine, tmp_path / "repository")
    for model in (made.name, made.engine_name):
        source = (made.path / model / "1" / "model.py").read_text()
        assert "class TritonPythonModel" in source
        compile(source, "model.py", "exec")


# --- backends of Triton's own


def test_a_plan_gets_its_plugin_beside_the_repository(tmp_path, library):
    engine = triton_engines.on_disk(tmp_path, padding="masked", backend="tensorrt")
    target = tmp_path / "out" / "repository"
    package_triton(engine, target, TritonOptions(name="m", plugin_folder="/opt/plugins"))
    made = Repository.load(target)
    assert (target / "m_engine/1/model.plan").read_text() == "a plan"
    assert not (target / "m_engine/1/model.py").exists()
    assert made.plugins == target.parent / "plugins"
    assert (made.plugins / "libours.so").read_text() == "code"
    assert made.server_arguments == ("--backend-config=tensorrt,plugins=/opt/plugins/libours.so",)
    (made.plugins / "libours.so").write_text("changed")
    with pytest.raises(EngineError, match="libours.so is missing or was changed"):
        Repository.load(target)


def test_another_build_of_a_plugin_is_not_overwritten(tmp_path, library):
    engine = triton_engines.on_disk(tmp_path, padding="masked", backend="tensorrt")
    package_triton(engine, tmp_path / "out" / "a")
    library.write_text("new code")
    with pytest.raises(OutputError, match="another build") as caught:
        package_triton(engine, tmp_path / "out" / "b")
    assert "--force" in caught.value.hint and not (tmp_path / "out" / "b").exists()
    package_triton(engine, tmp_path / "out" / "b", TritonOptions(replace=True))
    assert (tmp_path / "out" / "plugins" / "libours.so").read_text() == "new code"


def test_a_graph_for_cuda_names_its_operators(tmp_path, library):
    engine = triton_engines.on_disk(tmp_path, padding="masked", backend="onnxruntime-cuda")
    made = package_triton(engine, tmp_path / "repository", TritonOptions(name="m"))
    assert (made.path / "m_engine/1/model.onnx").read_text() == "a graph"
    config = (made.path / "m_engine/config.pbtxt").read_text()
    assert 'op_library_filename: [ "/plugins/libours.so" ]' in config
    assert made.server_arguments == ()


def test_the_library_must_be_the_one_the_engine_was_built_with(tmp_path, library):
    engine = triton_engines.on_disk(tmp_path, padding="masked", backend="tensorrt")
    data = json.loads((engine.path / "manifest.json").read_text()) | {"plugin_sha256": "00" * 32}
    (engine.path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(EngineError, match="not the library that the engine was built with"):
        package_triton(Engine.load(engine.path), tmp_path / "repository")


def test_our_own_runner_can_take_the_place_of_tritons_backends(tmp_path, library):
    engine = triton_engines.on_disk(tmp_path, padding="masked", backend="tensorrt")
    made = package_triton(engine, tmp_path / "repository", TritonOptions(name="m", own_runner=True))
    assert made.plugins is None and made.manifest["triton_backend"] == "python"
    assert Engine.load(made.path / "m_engine/1/engine").manifest == engine.manifest
    assert "KIND_GPU" in (made.path / "m_engine/config.pbtxt").read_text()


# --- versions


def test_a_version_is_added_beside_the_older_ones(engine, tmp_path):
    target = tmp_path / "repository"
    first = package_triton(engine, target, TritonOptions(name="m"))
    before = {name: (target / name).read_bytes() for name in tree(target) if "/1/" in name}
    again = triton_engines.on_disk(tmp_path / "new", padding="masked")
    (again.path / "model.onnx").write_text("a better graph")
    data = json.loads((again.path / "manifest.json").read_text())
    data["files"]["model.onnx"] = sha256_of_file(again.path / "model.onnx")
    (again.path / "manifest.json").write_text(json.dumps(data))
    package_triton(Engine.load(again.path), target, TritonOptions(add_version=True))
    made = Repository.load(target)
    assert (first.versions, made.versions, made.name) == ((1,), (1, 2), "m")
    assert {name: (target / name).read_bytes() for name in before} == before
    assert (target / "m_engine/2/engine/model.onnx").read_text() == "a better graph"
    assert "text_model" in made.manifest and (target / "m/2/model.py").is_file()


def test_versions_share_a_config(engine, tmp_path):
    target = tmp_path / "repository"
    package_triton(engine, target)
    other = triton_engines.on_disk(tmp_path / "new", Task.ENCODER, padding="masked")
    with pytest.raises(EngineError, match="task is encoder, theirs sequence-classification"):
        package_triton(other, target, TritonOptions(add_version=True))
    with pytest.raises(EngineError, match="text_model is another"):
        package_triton(engine, target, TritonOptions(name="another", add_version=True))
    assert Repository.load(target).versions == (1,)


# --- what is refused


def test_hf_engines_are_refused_unless_accepted_in_words(tmp_path):
    engine = triton_engines.on_disk(tmp_path, padding="hf")
    with pytest.raises(EngineError, match="padding hf") as caught:
        package_triton(engine, tmp_path / "repository")
    assert "export --padding masked" in caught.value.hint
    assert not (tmp_path / "repository").exists()
    accepted = TritonOptions(accept_batch_dependent_answers=True)
    made = package_triton(engine, tmp_path / "repository", accepted)
    assert made.manifest["accept_batch_dependent_answers"] is True
    assert "allow_ragged_batch" not in (made.path / made.engine_name / "config.pbtxt").read_text()


def test_an_engine_without_tokenizer_is_refused(tmp_path):
    engine = triton_engines.described(padding="masked", path=tmp_path)
    with pytest.raises(EngineError, match="no tokenizer"):
        package_triton(engine, tmp_path / "repository")


def test_an_engine_that_answers_with_an_error_is_refused(engine, tmp_path, answers):
    answers[0] = {"error": "computed NaN", "hint": None}
    with pytest.raises(EngineError, match="cannot answer .*computed NaN"):
        package_triton(engine, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_an_engine_that_cannot_run_here_has_no_golden_text(engine, tmp_path, monkeypatch):
    def run(engine, lines):
        raise EngineError("built for another machine")

    monkeypatch.setattr(answering, "run", run)
    said: list[str] = []
    made = package_triton(engine, tmp_path / "repository", progress=said.append)
    assert made.manifest["golden_text"] is None
    assert any("built for another machine" in text for text in said)


def test_what_is_there_is_only_replaced_when_it_is_ours_and_asked(engine, tmp_path):
    target = tmp_path / "repository"
    target.mkdir()
    (target / "letter").write_text("mine")
    with pytest.raises(OutputError, match="is not a model repository"):
        package_triton(engine, target, TritonOptions(replace=True))
    assert tree(target) == {"letter"}
    (target / "letter").unlink()
    target.rmdir()
    package_triton(engine, target)
    with pytest.raises(OutputError, match="exists") as caught:
        package_triton(engine, target)
    assert "--force" in caught.value.hint
    assert package_triton(engine, target, TritonOptions(name="other", replace=True)).name == "other"
    assert Repository.load(target).name == "other"


def test_a_failure_midway_leaves_nothing(engine, tmp_path, monkeypatch):
    def broken(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository_module, "write_text_model", broken)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="No space left"):
        package_triton(engine, tmp_path / "out" / "repository")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a/b"},
        {"name": ""},
        {"instances": 0},
        {"text_instances": 0},
        {"threads": 0},
        {"delay_us": -1},
    ],
)
def test_options_out_of_bounds(changes):
    with pytest.raises(InputError):
        TritonOptions(**changes)


# --- the command


def invoke(*arguments: str):
    group = Cli("convbert-deploy", commands=[package_command])
    return CliRunner().invoke(group, ["package", "triton", *arguments])


def test_the_command_says_what_it_wrote(engine, tmp_path):
    target = tmp_path / "repository"
    done = invoke(str(engine.path), "-o", str(target), "--name", "m", "--instances", "2")
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"wrote {target / 'models'}: m ") and "m_engine (python backend" in last
    assert "count: 2" in (target / "models/m_engine/config.pbtxt").read_text()
    again = invoke(str(engine.path), "-o", str(target))
    assert again.exit_code == 3 and "hint:  --force" in again.stderr
    result = json.loads(
        invoke(
            str(engine.path), "-o", str(target), "--force", "--environment", "/e", "--json"
        ).stdout
    )
    assert result["repository"] == str(target / "models") and result["environment"] == "/e"
    assert 'string_value: "/e"' in (target / "models/tiny_fp32/config.pbtxt").read_text()


def test_the_command_refuses_hf_with_exit_3(tmp_path):
    engine = triton_engines.on_disk(tmp_path, padding="hf")
    target = tmp_path / "repository"
    refused = invoke(str(engine.path), "-o", str(target))
    assert refused.exit_code == 3 and "export --padding masked" in refused.stderr
    accepted = invoke(str(engine.path), "-o", str(target), "--accept-batch-dependent-answers")
    assert accepted.exit_code == 0 and target.is_dir()
