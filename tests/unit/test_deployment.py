"""What is written around a model repository: does each program that reads it take it?"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import types

import pytest

from convbert_deploy.errors import EngineError
from convbert_deploy.triton.deployment import DeploymentFacts, facts_of, write_deployment
from convbert_deploy.triton.deployment.writing import render

from deployment_facts import ALL, CPU, PLAN

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module", params=list(ALL))
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "out"
    write_deployment(folder, ALL[request.param])
    return folder, ALL[request.param]


# --- every file


def test_files_are_those_named_and_hold_no_marks_of_the_templates(tmp_path):
    paths = write_deployment(tmp_path / "out", PLAN)
    found = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(map(str, paths)) == sorted(map(str, found))
    assert {"run.sh", "Dockerfile", ".dockerignore", "docker-compose.yaml", "README.md"} <= set(
        map(str, paths)
    )
    for path in paths:
        text = (tmp_path / "out" / path).read_text()
        assert not re.search(r"@[a-z_]+@|#@", text), path
        assert text.endswith("\n"), path
        if path.parts[:2] != ("helm", "templates"):
            assert "{{" not in text, path


def test_writing_again_replaces_every_file(tmp_path):
    write_deployment(tmp_path, PLAN)
    write_deployment(tmp_path, CPU)
    assert "libplugins" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_render_keeps_and_drops_lines():
    text = "a @x@\nb #@on\nc \\  #@!on\nd #@on #@!off\n"
    assert render(text, {"x": "1"}, {"on": True, "off": False}) == "a 1\nb\nd\n"
    assert render(text, {"x": "1"}, {"on": False, "off": False}) == "a 1\nc \\\n"
    with pytest.raises(KeyError):
        render("@y@", {"x": "1"}, {})
    with pytest.raises(KeyError):
        render("y #@unknown", {}, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "a b"}, "model name 'a b'"),
        ({"model": "$(id)"}, "model name"),
        ({"image": "x y"}, "image 'x y'"),
        ({"plugin_library": "../a.so"}, "plugin library"),
        ({"plugin_folder": "plugins"}, "plugin folder"),
        ({"http_port": 80}, "ports"),
        ({"http_port": 8001}, "three different"),
        ({"backend": "openvino"}, "openvino"),
        ({"backend": "tensorrt"}, "version of TensorRT"),
        ({"max_batch_size": -1}, "at least 0"),
    ],
)
def test_facts_that_files_cannot_hold(changes, words):
    with pytest.raises(EngineError, match=re.escape(words)):
        DeploymentFacts(**{"model": "m", "backend": "python", "package_version": "1"} | changes)


def test_names_versions_and_memory_as_kubernetes_takes_them():
    def facts(model, version="1.2.3", size=0):
        return DeploymentFacts(model, "python", version, model_bytes=size)

    names = [facts(model).kubernetes_name for model in ("base_fp32", "9lives", "A.b_", "x" * 90)]
    assert names == ["base-fp32", "model-9lives", "a-b", "x" * 50]
    charts = [facts("m", v).values()["chart_version"] for v in ("1.2.3", "0.2", "0.2.0.dev3+g1")]
    assert charts == ["1.2.3", "0.2.0", "0.2.0-dev3-g1"]
    assert [facts("m", size=size).memory_gibibytes for size in (0, 1, 1 << 30)] == [2, 3, 5]
    assert PLAN.values()["image_name"] == "registry.example:5000/nlp/model"


def test_facts_come_from_the_manifests(tmp_path):
    built = types.SimpleNamespace(
        backend="tensorrt",
        versions={"tensorrt": "10.13.3.9", "numpy": "2.0"},
        files={"model.plan": "0" * 64},
    )
    engine = types.SimpleNamespace(manifest=built, path=tmp_path)
    packaged = {
        "text_model": "m",
        "triton_backend": "tensorrt",
        "plugins": {"lib.so": "0" * 64},
        "max_batch_size": 16,
        "golden_text": {"request": {"text": "a"}, "answer": {}},
    }
    repository = types.SimpleNamespace(path=pathlib.Path("out/models"), manifest=packaged)
    (tmp_path / "model.plan").write_bytes(b"12345")
    facts = facts_of(repository, engine, http_port=9000)
    assert (facts.tensorrt_version, facts.plugin_library) == ("10.13.3.9", "lib.so")
    assert (facts.needs_gpu, facts.model_bytes, facts.extras) == (True, 5, ("serve",))
    assert (facts.golden_text, facts.http_port) == ('{"text": "a"}', 9000)
    built.backend = "onnxruntime-cpu"
    packaged |= {"triton_backend": "python", "plugins": {}, "golden_text": None}
    facts = facts_of(repository, engine)
    assert (facts.tensorrt_version, facts.plugin_library, facts.needs_gpu) == (None, None, False)
    assert (facts.extras, facts.golden_text) == (("serve", "ort"), None)
    assert facts.runtime is None, "an engine that does not say what it was built with"
    built.versions["onnxruntime"] = "1.31.1"
    assert facts_of(repository, engine).runtime == "onnxruntime==1.31.1"
    built.backend = "tensorrt"  # in the python backend: --own-runner
    facts = facts_of(repository, engine)
    assert (facts.extras, facts.runtime) == (("serve", "tensorrt"), "tensorrt==10.13.3.9")
    built.versions["tensorrt"] = "10.13; rm -rf /"
    with pytest.raises(EngineError, match="runtime .* has characters"):
        facts_of(repository, engine)


# --- run.sh


def run_script(folder, *arguments, program="tritonserver", **environment):
    """Run run.sh with a stand-in for ``program``; returns its lines of arguments and the result."""
    programs = folder.parent / "programs"
    programs.mkdir(exist_ok=True)
    log = folder.parent / "log"
    log.write_text("")
    (programs / program).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{log}"\n')
    (programs / program).chmod(0o755)
    result = subprocess.run(
        [str(folder / "run.sh"), *arguments],
        env={"PATH": f"{programs}:/usr/bin:/bin"} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )
    return log.read_text().splitlines(), result


def test_run_script_starts_the_server(tmp_path):
    write_deployment(tmp_path / "o u t", CPU)
    seen, result = run_script(tmp_path / "o u t", "--log-verbose=1", HTTP_PORT="9999")
    assert result.returncode == 0, result.stderr
    assert seen == [
        f"--model-repository={tmp_path}/o u t/models",
        "--model-control-mode=explicit",
        "--load-model=tagger_engine",
        "--load-model=tagger",
        "--http-port=9999",
        "--grpc-port=8001",
        "--metrics-port=8002",
        "--log-verbose=1",
    ]


def test_run_script_wants_its_plugin(tmp_path):
    plugins = tmp_path / "plugins"
    facts = dataclasses.replace(PLAN, plugin_folder=str(plugins))
    write_deployment(tmp_path / "out", facts)
    seen, result = run_script(tmp_path / "out")
    assert (seen, result.returncode) == ([], 3)
    assert "libplugins.so is missing" in result.stderr
    plugins.mkdir()
    (plugins / "libplugins.so").touch()
    seen, result = run_script(tmp_path / "out", MODEL_REPOSITORY="/models")
    assert seen[0] == "--model-repository=/models"
    assert f"--backend-config=tensorrt,plugins={plugins}/libplugins.so" in seen


@pytest.mark.parametrize("name", list(ALL))
def test_run_script_builds_and_runs_the_image(tmp_path, name):
    write_deployment(tmp_path / "out", ALL[name])
    seen, result = run_script(tmp_path / "out", "docker", "--log-info=0", program="docker")
    assert result.returncode == 0, result.stderr
    image = ALL[name].values()["image"]
    start = seen.index("run")
    assert seen[:start] == ["build", "--tag", image, str(tmp_path / "out")]
    assert seen[-2:] == [image, "--log-info=0"]
    assert ("--gpus" in seen) is ALL[name].needs_gpu
    published = [seen[i + 1] for i, word in enumerate(seen) if word == "--publish"]
    assert len(published) == 3 and all(port.startswith("127.0.0.1:") for port in published)


# --- the image and compose


def test_image(written):
    folder, facts = written
    text = (folder / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", text)
    steps = [line.split(" ", 1)[0] for line in joined.splitlines() if line and line[0] != "#"]
    known = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert steps[0] == "FROM" and set(steps) - {""} <= known
    assert f"FROM {facts.triton_image}\n" in text and "USER 1000:1000" in text
    assert ("libnvinfer.so.10.13.3'" in text) is (facts.backend == "tensorrt")
    assert ("COPY plugins/ /plugins/" in text) is (facts.plugin_library is not None)
    assert f"/convbert_deploy-{facts.package_version}-*.whl" in text and "'numpy<2'" in text
    pinned = re.findall(r"^RUN .* ([a-z-]+==\S+) ", joined, re.MULTILINE)
    assert pinned == [facts.runtime] * (facts.runtime is not None)
    copied = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
    kept = {line[1:] for line in (folder / ".dockerignore").read_text().splitlines()[1:]}
    assert {path.rstrip("/") for path in copied} == kept
    health = json.loads(re.search(r"CMD (\[.*\])", text).group(1))
    assert health == facts.probe_command(f"/opt/convbert/{facts.repository}")
    for command in re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.MULTILINE):
        subprocess.run(["sh", "-n", "-c", command], check=True, timeout=10)


#: of https://github.com/compose-spec/compose-spec/blob/main/schema/compose-spec.json
COMPOSE_SERVICE_KEYS = {
    *("build", "image", "init", "read_only", "tmpfs", "shm_size", "cap_drop", "security_opt"),
    *("restart", "stop_grace_period", "ports", "healthcheck", "deploy"),
}


def test_compose(written):
    folder, facts = written
    document = yaml.safe_load((folder / "docker-compose.yaml").read_text())
    assert set(document) == {"name", "services"}
    (service,) = document["services"].values()
    assert set(service) <= COMPOSE_SERVICE_KEYS
    assert service["image"] == facts.values()["image"] and service["read_only"] is True
    ports = [facts.http_port, facts.grpc_port, facts.metrics_port]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    check = service["healthcheck"]
    assert set(check) == {"test", "interval", "timeout", "retries", "start_period"}
    assert check["test"] == ["CMD", *facts.probe_command(f"/opt/convbert/{facts.repository}")]
    reserved = service["deploy"]["resources"].get("reservations", {}).get("devices", [])
    assert [device["capabilities"] for device in reserved] == [["gpu"]] * facts.needs_gpu


@pytest.mark.skipif(not shutil.which("docker"), reason="no docker client")
def test_compose_is_read_by_docker(written):
    folder, _ = written
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("no compose plugin")
    subprocess.run(
        ["docker", "compose", "--file", str(folder / "docker-compose.yaml"), "config", "--quiet"],
        check=True,
        timeout=60,
    )


def test_guide_tells_a_request_that_the_server_reads(written):
    folder, facts = written
    text = (folder / "README.md").read_text()
    command = re.search(r"^curl -s .*\\\n.*$", text, re.MULTILINE).group()
    words = shlex.split(command)
    assert words[2].endswith(f":{facts.http_port}/v2/models/{facts.model}/infer")
    (tensor,) = json.loads(words[words.index("-d") + 1])["inputs"]
    assert tensor["shape"] == [1, 1] and len(tensor["data"]) == 1
    assert ("TensorRT 10.13.3.9" in text) is (facts.backend == "tensorrt")
