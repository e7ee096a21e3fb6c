"""The written files in use: run.sh starts a real server; the probe and the guide's request reach it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request

import pytest
from click.testing import CliRunner

from convbert_deploy.architecture import Task
from convbert_deploy.serving.command import probe
from convbert_deploy.triton.deployment import facts_of, write_deployment
from convbert_deploy.triton.repository import Repository

from serving.triton_server import wait_until

pytestmark = pytest.mark.serving


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def tritonserver(folder, environment):
    """A program of that name: the tests' server, on loopback alone."""
    folder.mkdir()
    libraries = ":".join(map(str, environment.libraries))
    addresses = " ".join(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics"))
    program = folder / "tritonserver"
    program.write_text(
        f'#!/bin/sh\nexport LD_LIBRARY_PATH="{libraries}"\n'
        f'exec "{environment.server}/bin/tritonserver" '
        f'--backend-directory="{environment.backends}" {addresses} "$@"\n'
    )
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def service(engine_of, repository_of, triton_environment, tmp_path_factory):
    """The folder, its facts and the process that run.sh became."""
    task, folder = Task.SEQUENCE_CLASSIFICATION, tmp_path_factory.mktemp("deployment")
    repository = Repository.load(repository_of(task))
    http, grpc, metrics = free_ports(3)
    facts = facts_of(
        repository, engine_of(task), http_port=http, grpc_port=grpc, metrics_port=metrics
    )
    write_deployment(folder / "service", facts)
    programs = tritonserver(folder / "programs", triton_environment)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [folder / "service" / "run.sh", "--exit-timeout-secs=20"],
            env={
                "PATH": f"{programs}:/usr/bin:/bin",
                "HOME": str(folder),
                "MODEL_REPOSITORY": str(repository.path),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or ready(http), 120, "the server is ready")
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield folder / "service", facts, repository, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def ready(port):
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/v2/health/ready", timeout=5
        ) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_probe_guide_metrics_and_stop(service):
    """One server start for all of it: the last step stops it."""
    folder, facts, repository, process = service
    words = facts.probe_command(str(repository.path))
    assert words[:2] == ["convbert-deploy", "probe"] and "--text" in words
    result = CliRunner().invoke(probe, words[2:])
    assert result.exit_code == 0, result.output

    guide = (folder / "README.md").read_text()
    command = re.search(r"^curl -s .*\\\n.*$", guide, re.MULTILINE).group()
    answer = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert '"outputs"' in answer and "scores" in answer

    url = f"http://127.0.0.1:{facts.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as metrics:
        seen = metrics.read().decode()
    # what the alerts read
    for name in ("request_failure", "request_success", "queue_duration_us"):
        for model in (facts.model, facts.engine_model):
            assert f'nv_inference_{name}{{model="{model}"' in seen

    process.terminate()
    assert process.wait(60) == 0
