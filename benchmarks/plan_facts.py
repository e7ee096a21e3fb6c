"""What TensorRT for RTX makes of ConvBERT-base: kernels, fusion, scratch.

No GPU is needed. ``python benchmarks/plan_facts.py --markdown benchmarks/results/FILE.md``. Compared:
the encoder as torch exports transformers' own modules, ours without and with the plugins; one
feed-forward block alone, whose scratch is a floor for any encoder built from separate products; then
what each pass changes, kept or tried and left out, and what several profiles cost.
Equal digests need a fixed heap layout: TensorRT-RTX 1.7 names tensors by address, so each digest is
taken in a new process under ``setarch -R``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import onnx
import plan_variants
from onnx import helper, numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.backends.buckets import length_profiles
from convbert_deploy.backends.tensorrt_plan import Plan, PlanFacts, PlanOptions, build_plan
from convbert_deploy.build import for_our_kernels
from convbert_deploy.calibration import typed_graph
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.exporting import OPSET, traced_graph
from convbert_deploy.operators import DOMAIN, nodes_of
from convbert_deploy.passes.tensorrt import tensorrt_passes
from convbert_deploy.plugin_library import tensorrt_library
from convbert_deploy.precision import Precision
from convbert_deploy.report_table import markdown_table
from convbert_deploy.shapes import ShapeProfile

import factories

PROFILE = ShapeProfile.parse("batch=1:8:32,seq=16:128:512")
TARGET = "SM89"
HIDDEN, INTERMEDIATE = 768, 3072
PASS_COLUMNS = [
    "graph",
    "",
    "kernels a layer",
    "kernels",
    "scratch MB",
    "fused attention",
    "network layers",
]


@functools.cache
def typed(
    layers: int, precision: Precision, padding: str = "hf", task: Task = Task.ENCODER
) -> onnx.ModelProto:
    model = factories.realistic_model("base", task, layers=layers)
    return typed_graph(traced_graph(model, task, padding), precision)


def ours(layers: int, precision: Precision, *, padding: str = "hf", plugin: bool = True) -> bytes:
    graph = typed(layers, precision, padding)
    if plugin:
        graph = for_our_kernels(graph, "tensorrt-rtx")
    return graph.SerializeToString()


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes of our operators run as plugins."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [function for function in copy.functions if function.domain != DOMAIN]
    del copy.functions[:]
    copy.functions.extend(kept)
    return copy


def transformers_export(layers: int) -> bytes:
    """fp16, by torch.onnx.export, nothing changed."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = factories.realistic_model("base", Task.ENCODER, layers=layers).half()

        def forward(self, input_ids, attention_mask, token_type_ids):
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )
            return outputs.last_hidden_state

    example = tuple(torch.ones(2, 17, dtype=torch.int64) for _ in range(3))
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq", min=2, max=512)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Encoder().eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["hidden"],
            dynamic_shapes=(axes,) * 3,
            verbose=False,
        )
        program.save(f"{folder}/model.onnx")
        return onnx.load(f"{folder}/model.onnx").SerializeToString()


def feed_forward() -> bytes:
    """One residual feed-forward block, fp16."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.standard_normal(shape) * 0.02
        return numpy_helper.from_array(values.astype(np.float16), name)

    nodes = [
        helper.make_node("Relu", ["input"], ["x"]),  # so that x is scratch, as between layers
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node("Gelu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["d"]),
        helper.make_node("Add", ["d", "x"], ["e"]),
        helper.make_node("Cast", ["e"], ["output"], to=onnx.TensorProto.FLOAT),
    ]
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    axes = ["batch", "seq", HIDDEN]
    graph = helper.make_graph(
        nodes,
        "feed_forward",
        [helper.make_tensor_value_info("input", half, axes)],
        [helper.make_tensor_value_info("output", full, axes)],
        [
            weight("w1", HIDDEN, INTERMEDIATE),
            weight("b1", INTERMEDIATE),
            weight("w2", INTERMEDIATE, HIDDEN),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def build(model: bytes, profile: ShapeProfile | Sequence[ShapeProfile] = PROFILE) -> Plan:
    """With the plugins if the graph has lost its functions, else without."""
    loaded = onnx.load_from_string(model)
    nodes = len(nodes_of(loaded)) if not loaded.functions else 0
    return build_plan(
        model,
        profile,
        PlanOptions(
            plugin_library=tensorrt_library() if nodes else None,
            compute_capabilities=(TARGET,),
            expected_plugin_layers=nodes,
        ),
    )


def row(name: str, model: bytes) -> list[str]:
    start = time.perf_counter()
    facts = build(model).facts
    return [
        name,
        str(facts.plugin_layers),
        str(facts.kernel_count),
        str(facts.fused_attention),
        f"{facts.scratch_bytes / 1e6:.1f}",
        str(facts.network_layers),
        f"{facts.plan_bytes / 1e6:.1f}",
        f"{time.perf_counter() - start:.1f}",
    ]


def rows(layers: int) -> list[list[str]]:
    fp16 = Precision.FP16
    cases = [
        ("2 layers, fp16, as torch exports transformers", lambda: transformers_export(2)),
        ("2 layers, fp16, ours, no plugin", lambda: ours(2, fp16, plugin=False)),
        ("2 layers, fp16, ours", lambda: ours(2, fp16)),
        ("2 layers, fp16, ours, masked", lambda: ours(2, fp16, padding="masked")),
        ("one feed-forward block, fp16", feed_forward),
    ]
    for precision in (fp16, Precision.BF16, Precision.FP32):
        for plugin in (True, False):
            name = f"{layers} layers, {precision}, ours{'' if plugin else ', no plugin'}"
            cases.append((name, lambda p=precision, q=plugin: ours(layers, p, plugin=q)))
    table = []
    for name, make in cases:
        table.append(row(name, make()))
        print(table[-1], file=sys.stderr, flush=True)
    return table


def passes() -> list[list[str]]:
    """Kernels a layer (the difference of 4 layers and 2, halved), kernels and scratch, fp16."""
    half, classifier = Precision.FP16, Task.SEQUENCE_CLASSIFICATION

    def built(make: Callable[[int], onnx.ModelProto | bytes]) -> list[PlanFacts]:
        models = [make(layers) for layers in (2, 4)]
        return [
            build(model if isinstance(model, bytes) else model.SerializeToString()).facts
            for model in models
        ]

    def final(layers: int, task: Task = Task.ENCODER) -> onnx.ModelProto:
        return for_our_kernels(typed(layers, half, task=task), "tensorrt-rtx")

    cases: list[tuple[str, str, Callable[[int], onnx.ModelProto | bytes]]] = [
        ("as torch exports transformers", "", transformers_export),
        ("traced: merged projections, sliced convolution", "kept", lambda n: typed(n, half)),
        (
            "+ SpanDynamicConv and DepthwiseConv1D as plugins",
            "kept",
            lambda n: without_functions(typed(n, half)),
        ),
        ("+ kernel generator inside the convolution", "kept", final),
    ]
    for name, variant in plan_variants.VARIANTS.items():
        cases.append((f"then {name}", "left out", lambda n, v=variant: v(final(n))))
    cases += [
        ("classifier, before SelectedRows", "", lambda n: final(n, classifier)),
        (
            "classifier, + SelectedRows",
            "kept",
            lambda n: tensorrt_passes(final(n, classifier))[0],
        ),
    ]
    table = []
    for name, verdict, make in cases:
        two, four = built(make)
        table.append(
            [
                name,
                verdict,
                f"{(four.kernel_count - two.kernel_count) / 2:g}",
                str(two.kernel_count),
                f"{two.scratch_bytes / 1e6:.2f}",
                str(two.fused_attention),
                str(two.network_layers),
            ]
        )
        print(table[-1], file=sys.stderr, flush=True)
    return table


def profiles() -> list[list[str]]:
    """One profile and one for each range of lengths, two layers in fp16 with plugins."""
    model = ours(2, Precision.FP16)
    table = []
    for name, given in (("one", (PROFILE,)), ("by length", length_profiles(PROFILE))):
        start = time.perf_counter()
        facts = build(model, given).facts
        table.append(
            [
                f"{name}: {', '.join(str(each.seq) for each in given)}",
                str(facts.kernel_count),
                f"{facts.scratch_bytes / 1e6:.2f}",
                f"{facts.plan_bytes / 1e6:.2f}",
                f"{time.perf_counter() - start:.1f}",
            ]
        )
        print(table[-1], file=sys.stderr, flush=True)
    return table


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
        print(hashlib.sha256(build(options.digest.read_bytes()).data).hexdigest())
        return 0
    table = rows(options.layers)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(ours(options.layers, Precision.FP16))
        file.flush()
        digests = [digest_of_new_process(file.name) for _ in range(2)]
    header = benchmark_header(environment(), threads=None)
    columns = [
        "base encoder",
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
            f"# TensorRT-RTX plans of ConvBERT-base's encoder, {TARGET}, {PROFILE}",
            "",
            *[f"- {k}: {v}" for k, v in header.items()],
            f"- two builds of the fp16 plan with plugins, sha256: {digests[0]} and {digests[1]}",
            "",
            markdown_table(columns, table),
            "",
            "## Passes, base, fp16, 2 layers",
            "",
            "Scratch is at 32 x 512. SelectedRows computes attention output, LayerNorms and "
            "feed-forward block of the last layer for one row of each sequence: 78 % of that layer's "
            "products are gone, which neither kernels nor scratch show.",
            "",
            markdown_table(PASS_COLUMNS, passes(), left=2),
            "",
            "## Profiles, base, fp16, 2 layers",
            "",
            markdown_table(
                ["profiles (seq)", "kernels of the last", "scratch MB", "plan MB", "build s"],
                profiles(),
            ),
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
