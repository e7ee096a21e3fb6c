"""Which peers there are, how they come to be installed, and one of them for real."""

from __future__ import annotations

import importlib.metadata
import pathlib
import sys

import numpy as np
import pytest

from convbert_deploy.benchmarking import bench as bench_module
from convbert_deploy.benchmarking import peer_environments
from convbert_deploy.benchmarking.bench import BenchRequest, bench
from convbert_deploy.benchmarking.cases import Point
from convbert_deploy.benchmarking.machine_watch import (
    MachineState,
    load_warnings,
    machine_state,
    state_warnings,
)
from convbert_deploy.benchmarking.options import BenchOptions
from convbert_deploy.benchmarking.peer_environments import (
    install_command,
    peer_folder,
    peer_python,
    requirements,
)
from convbert_deploy.benchmarking.peers import PEERS, Peer, PeerError, PeerRequest, Requirement
from convbert_deploy.benchmarking.worker.serve import LOADERS
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.command_line import PEERS_HELP
from convbert_deploy.engine import Engine

_ABSENT = Peer("absent", ("fp32",), (Requirement("no-such-package-here>=1", ""),), "")


@pytest.fixture
def no_pip(monkeypatch, tmp_path):
    """Commands are noted and not run; those of ``fails`` fail."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands, fails = [], []

    def run(command, what):
        commands.append(command)
        if any(word in command for word in fails):
            raise PeerError(f"cannot {what}")
        if "venv" in command:
            pathlib.Path(command[-1]).mkdir(parents=True)
        return "package==1.0\n"

    monkeypatch.setattr(peer_environments, "_run", run)
    monkeypatch.setattr(peer_environments, "_imports", lambda *_: True)
    return commands, fails


def test_a_peer_is_named_with_its_precision():
    assert str(PeerRequest.parse("eager")) == "eager fp32"
    assert str(PeerRequest.parse("openvino:bf16")) == "openvino bf16"
    with pytest.raises(PeerError, match="unknown peer 'tvm'.*openvino"):
        PeerRequest.parse("tvm")
    with pytest.raises(PeerError, match="no precision 'int8'.*fp32, bf16"):
        PeerRequest.parse("eager:int8")


def test_every_peer_has_a_loader_a_reason_for_each_range_and_is_in_the_help():
    assert {peer.kind for peer in PEERS.values()} <= set(LOADERS)
    for peer in PEERS.values():
        assert all(one.reason for one in peer.requirements)
        assert peer.name in PEERS_HELP


def test_an_absent_peer_is_refused_with_the_option_that_installs_it(no_pip):
    with pytest.raises(PeerError, match="absent is not installed: it needs no-such") as refusal:
        peer_python(_ABSENT, install=False)
    assert "--install-peers" in refusal.value.hint
    assert not no_pip[0]


def test_an_environment_is_made_once(no_pip):
    commands, _ = no_pip
    first = peer_python(_ABSENT, install=True)
    assert first == peer_folder(_ABSENT) / "bin" / "python"
    assert [str(first), "-m", "pip", "install"] == commands[1][:4]
    assert commands[1][-1] == "no-such-package-here>=1"
    made = len(commands)
    assert peer_python(_ABSENT, install=False) == first
    assert len(commands) == made


def test_a_failed_installation_leaves_nothing_that_looks_complete(no_pip):
    _, fails = no_pip
    fails.append("install")
    with pytest.raises(PeerError, match="cannot install absent"):
        peer_python(_ABSENT, install=True)
    assert not peer_folder(_ABSENT).exists()
    fails.clear()
    assert peer_python(_ABSENT, install=True).parent.parent == peer_folder(_ABSENT)


def test_pip_args_reach_pip(no_pip, monkeypatch):
    monkeypatch.setenv("PIP_ARGS", "--extra-index-url https://index/cpu")
    peer_python(_ABSENT, install=True)
    assert "https://index/cpu" in no_pip[0][1]


def test_this_environment_serves_where_it_has_everything():
    assert peer_python(PEERS["eager"], install=False) == pathlib.Path(sys.executable)


def test_torch_is_the_one_that_runs_here_and_a_changed_range_is_another_environment():
    torch = importlib.metadata.version("torch")
    assert f"torch=={torch}" in requirements(PEERS["openvino"])
    assert install_command(PEERS["openvino"]).startswith("pip install torch==")
    changed = Peer("absent", ("fp32",), (Requirement("no-such-package-here>=2", ""),), "")
    assert peer_folder(changed) != peer_folder(_ABSENT)


def _write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_machine_is_watched(tmp_path):
    assert machine_state(tmp_path) == MachineState(None, None, None, None)
    cpu = "sys/devices/system/cpu/cpu0"
    _write(tmp_path, "proc/loadavg", "2.50 1.00 0.50 1/99 12345\n")
    _write(tmp_path, f"{cpu}/thermal_throttle/core_throttle_count", "3\n")
    _write(tmp_path, f"{cpu}/cpufreq/scaling_cur_freq", "2000000\n")
    _write(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 5\nnr_throttled 2\n")
    before = machine_state(tmp_path)
    assert before == MachineState(2.5, 3, 2, 2000.0)
    assert list(state_warnings(before, before)) == []
    _write(tmp_path, f"{cpu}/thermal_throttle/core_throttle_count", "5\n")
    _write(tmp_path, f"{cpu}/cpufreq/scaling_cur_freq", "1500000\n")
    _write(tmp_path, "sys/fs/cgroup/cpu.stat", "nr_throttled 4\n")
    warned = {one.code: one.text for one in state_warnings(before, machine_state(tmp_path))}
    assert set(warned) == {"throttling", "quota", "clock"}
    assert "2 times" in warned["throttling"] and "1500" in warned["clock"]


def test_load_counts_against_the_cores_that_are_left():
    busy, idle = MachineState(1e6, None, None, None), MachineState(0.0, None, None, None)
    assert [one.code for one in load_warnings(busy, 1)] == ["load"]
    assert list(load_warnings(idle, 1)) == []


def test_peers_need_a_checkpoint(sample_engine):
    request = BenchRequest((sample_engine.path,), peers=(PeerRequest.parse("eager:bf16"),))
    with pytest.raises(PeerError, match="checkpoint") as refusal:
        bench(request)
    assert "--baseline" in refusal.value.hint


def test_a_peer_that_reads_a_graph_needs_one(sample_engine, classifier, monkeypatch):
    monkeypatch.setattr(bench_module, "peer_python", lambda *_, **__: pathlib.Path(sys.executable))
    peers = (PeerRequest.parse("openvino-graph:bf16"),)
    request = BenchRequest((sample_engine.path,), baseline=classifier, peers=peers, ceiling=False)
    with pytest.raises(PeerError, match="none was given") as refusal:
        bench(request)
    assert "--graph" in refusal.value.hint


def test_the_graph_that_peers_read_has_standard_operators_alone(classifier_graph, tmp_path):
    import onnx

    bench_module._save_inlined(classifier_graph.path, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert not model.functions and {node.domain for node in model.graph.node} == {""}


def test_a_peer_shares_the_environment_of_the_one_it_works_as():
    assert peer_folder(PEERS["openvino-graph"]) == peer_folder(PEERS["openvino"])
    assert peer_folder(PEERS["openvino"]) != peer_folder(PEERS["optimum"])


@pytest.fixture(scope="module")
def sample_engine(classifier_graph, tmp_path_factory) -> Engine:
    target = tmp_path_factory.mktemp("engine") / "a.engine"
    return build_engine(classifier_graph, target, BuildOptions(plugin=False))


def test_engine_and_eager_in_processes_of_their_own(sample_engine, classifier, monkeypatch):
    monkeypatch.setattr(bench_module, "buffer_bytes", lambda _: 1)
    options = BenchOptions(min_time_s=0, min_runs=3, max_runs=3, warmup=1)
    request = BenchRequest(
        (sample_engine.path,),
        baseline=classifier,
        peers=(PeerRequest.parse("eager:bf16"),),
        points=(Point(2, 9),),
        threads=1,
        options=options,
        ceiling=False,
    )
    report = bench(request)
    names = ["eager fp32", "eager bf16", "onnxruntime-cpu fp32"]
    assert [one.candidate for one in report.measurements] == names
    eager, half, engine = report.measurements
    assert 0 < engine.max_abs_difference < 2e-5 < half.max_abs_difference
    assert eager.max_abs_difference is None
    assert np.all(np.array(eager.times_ms) > 0)
    for one in report.measurements:
        assert one.facts.ready_ms > one.facts.load_ms > 0
        assert one.peak_bytes >= 20 << 20
        assert one.facts.weights_bytes > 0
    assert half.facts.weights_bytes * 2 == eager.facts.weights_bytes
    assert report.candidates["eager fp32"].versions["torch"]
    assert report.left_out == ()
