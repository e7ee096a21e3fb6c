"""What TensorRT for RTX makes of ConvBERT-base: kernels, fusion, scratch, with and without the plugin.

No GPU is needed. ``python benchmarks/plan_facts.py --markdown benchmarks/results/FILE.md``.
Equal digests need a fixed heap layout: TensorRT-RTX 1.7 names tensors by address, so each digest is
taken in a new process under ``setarch -R``.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

from convbert_deploy.backends.tensorrt_plan import Plan, PlanOptions, build_plan
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.operators import nodes_of
from convbert_deploy.plugin_library import tensorrt_library
from convbert_deploy.precision import Precision
from convbert_deploy.report_table import markdown_table
from convbert_deploy.shapes import ShapeProfile

PROFILE = ShapeProfile.parse("batch=1:8:32,seq=16:128:512")
TARGET = "SM89"


def graph(layers: int, precision: Precision) -> bytes:
    from convbert_deploy.architecture import Task
    from convbert_deploy.calibration import typed_graph
    from convbert_deploy.exporting import traced_graph

    import factories

    task = Task.SEQUENCE_CLASSIFICATION
    model = traced_graph(factories.realistic_model("base", task, layers=layers), task)
    return typed_graph(model, precision).SerializeToString()


def build(model: bytes, layers: int, *, plugin: bool) -> Plan:
    return build_plan(
        model,
        PROFILE,
        PlanOptions(
            plugin_library=tensorrt_library() if plugin else None,
            compute_capabilities=(TARGET,),
            expected_plugin_layers=layers if plugin else 0,
        ),
    )


def row(layers: int, precision: Precision, *, plugin: bool) -> list[str]:
    model = graph(layers, precision)
    start = time.perf_counter()
    plan = build(model, layers, plugin=plugin)
    spent = time.perf_counter() - start
    facts = plan.facts
    return [
        f"{layers} layers, {precision}, {'plugin' if plugin else 'no plugin'}",
        str(facts.plugin_layers),
        str(facts.kernel_count),
        str(facts.fused_attention),
        f"{facts.scratch_bytes / 1e6:.1f}",
        str(facts.network_layers),
        f"{facts.plan_bytes / 1e6:.1f}",
        f"{spent:.1f}",
    ]


def digest_of_new_process(path: str) -> str:
    command = ["setarch", "-R", sys.executable, __file__, "--digest", path]
    return subprocess.check_output(command, text=True).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--markdown", type=pathlib.Path)
    parser.add_argument("--digest", type=pathlib.Path, help="build this graph, print the sha256")
    options = parser.parse_args()
    if options.digest:
        import onnx

        layers = len(nodes_of(onnx.load(options.digest)))
        plan = build(options.digest.read_bytes(), layers, plugin=True)
        print(hashlib.sha256(plan.data).hexdigest())
        return 0
    rows = []
    for precision in (Precision.FP16, Precision.BF16, Precision.FP32):
        for plugin in (True, False):
            rows.append(row(options.layers, precision, plugin=plugin))
            print(rows[-1], file=sys.stderr, flush=True)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(graph(options.layers, Precision.FP16))
        file.flush()
        digests = [digest_of_new_process(file.name) for _ in range(2)]
    header = benchmark_header(environment(), threads=None)
    columns = [
        "base",
        "plugin layers",
        "kernels",
        "fused attention",
        "scratch MB",
        "network layers",
        "plan MB",
        "build s",
    ]
    text = "\n".join(
        [
            f"# TensorRT-RTX plans of ConvBERT-base, {TARGET}, {PROFILE}",
            "",
            *[f"- {k}: {v}" for k, v in header.items()],
            f"- two builds of the fp16 plan with plugin, sha256: {digests[0]} and {digests[1]}",
            "",
            markdown_table(columns, rows),
            "",
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)
    return 0 if digests[0] == digests[1] else 1


if __name__ == "__main__":
    sys.exit(main())
