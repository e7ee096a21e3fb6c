"""Other tools that make INT8 models of ConvBERT, each in the settings its users are told of.

Imported by ``int8_peers.py``. Every tool starts from what ``torch.onnx.export`` makes of transformers'
own modules, with ``value_info`` deleted: ONNX Runtime's quantizers fail on it (``ShapeInferenceError:
(384) vs (2)``, onnxruntime 1.31 and torch 2.13).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import pathlib
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from convbert_deploy.backends.base import Batch
from convbert_deploy.calibration.samples import CalibrationSamples
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.serving.requests import INPUT_NAMES

#: positions of a calibration batch: 16 texts of 64 tokens
_BATCH_POSITIONS = 1024
_MODELOPT_SECONDS = 1800
#: runs in ModelOpt's environment, which has none of our packages
_MODELOPT_PROGRAM = """
import json, sys
import numpy
from modelopt.onnx.quantization import quantize
job = json.load(sys.stdin)
quantize(
    job["graph"],
    quantize_mode="int8",
    calibration_data=dict(numpy.load(job["samples"])),
    output_path=job["target"],
    **job["options"],
)
"""


class PeerError(Exception):
    """A tool could not make a model; the message is its own."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a tool is given: a graph, calibration rows, where to write, and the nodes that are to
    stay float. modelopt_python: the interpreter of ModelOpt's environment."""

    graph: pathlib.Path
    samples: CalibrationSamples
    target: pathlib.Path
    exclude: tuple[str, ...] = ()
    modelopt_python: pathlib.Path | None = None


Make = Callable[[Job], None]


class SampleReader:
    """ONNX Runtime's CalibrationDataReader: batches of rows of one length, without padding."""

    def __init__(self, samples: CalibrationSamples) -> None:
        self._batches = [batch for _, batch in samples.batches(_BATCH_POSITIONS)]
        self._pending: Iterator[Batch] = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """The batches that ``get_next`` gives from now on."""
        self._pending = iter(self._batches[start_index:end_index])

    def get_next(self) -> Batch | None:
        return next(self._pending, None)


def padded(samples: CalibrationSamples) -> dict[str, np.ndarray]:
    """All rows as int64 arrays of one length, the form ModelOpt takes: (rows, seq)."""
    longest = max(row.positions for row in samples.rows)
    return {
        name: np.stack(
            [np.pad(row.inputs[name], (0, longest - row.positions)) for row in samples.rows]
        )
        for name in INPUT_NAMES
    }


def _dynamic(**settings: Any) -> Make:
    def make(job: Job) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: TID251

        quantize_dynamic(
            job.graph,
            job.target,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(job.exclude),
            **settings,
        )

    return make


def _static(
    method: str = "MinMax",
    extra: Mapping[str, Any] | None = None,
    *,
    attention: bool = True,
    **settings: Any,
) -> Make:
    def make(job: Job) -> None:
        from onnxruntime.quantization import CalibrationMethod, quantize_static  # noqa: TID251

        # MatMulConstBOnly is ignored for Q/DQ (onnxruntime 1.31): nodes have to be named
        spared = () if attention else attention_products(job.graph)
        quantize_static(
            job.graph,
            job.target,
            SampleReader(job.samples),
            calibrate_method=getattr(CalibrationMethod, method),
            nodes_to_exclude=[*job.exclude, *spared],
            # one batch at a time: without it entropy keeps every activation of every text in memory
            # and fails on batches of different lengths
            extra_options={"CalibStridedMinMax": 1, **(extra or {})},
            **settings,
        )

    return make


def _modelopt(**options: Any) -> Make:
    def make(job: Job) -> None:
        if job.modelopt_python is None:
            raise PeerError("not run: needs --modelopt-python")
        samples = job.target.with_suffix(".npz")
        np.savez(samples, **padded(job.samples))
        asked = {
            "graph": str(job.graph),
            "samples": str(samples),
            "target": str(job.target),
            "options": {**options, "nodes_to_exclude": list(job.exclude)},
        }
        done = subprocess.run(
            [str(job.modelopt_python), "-c", _MODELOPT_PROGRAM],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_MODELOPT_SECONDS,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise PeerError(lines[-1] if lines else f"exit code {done.returncode}")

    return make


_FLOAT_OUTPUTS = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
_SYMMETRIC = {**_FLOAT_OUTPUTS, "ActivationSymmetric": True}
_PRODUCTS = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
_LINEARS = {**_PRODUCTS, "attention": False}

#: In the order of the table. products: every MatMul and Gemm, attention's among them; linears: those
#: with weights. Min-max unless entropy is named; asymmetric activations unless symmetric is.
#: ModelOpt quantizes the two sums of a layer's residuals unless Add is excluded.
PEERS: dict[str, Make] = {
    "ORT dynamic, per tensor": _dynamic(),
    "ORT dynamic, per channel": _dynamic(per_channel=True),
    "ORT static, its defaults (every op type, per tensor)": _static(),
    "ORT static, every op type, per channel": _static(per_channel=True),
    "ORT static, products": _static(**_PRODUCTS),
    "ORT static, products, float outputs": _static("MinMax", _FLOAT_OUTPUTS, **_PRODUCTS),
    "ORT static, products, float outputs, entropy": _static("Entropy", _FLOAT_OUTPUTS, **_PRODUCTS),
    "ORT static, products, float outputs, symmetric": _static("MinMax", _SYMMETRIC, **_PRODUCTS),
    "ORT static, products, float outputs, symmetric, entropy": _static(
        "Entropy", _SYMMETRIC, **_PRODUCTS
    ),
    "ORT static, linears, float outputs, per tensor": _static(
        "MinMax", _FLOAT_OUTPUTS, **{**_LINEARS, "per_channel": False}
    ),
    "ORT static, linears, float outputs": _static("MinMax", _FLOAT_OUTPUTS, **_LINEARS),
    "ORT static, linears, float outputs, entropy": _static("Entropy", _FLOAT_OUTPUTS, **_LINEARS),
    "ORT static, linears, float outputs, symmetric": _static("MinMax", _SYMMETRIC, **_LINEARS),
    "ORT static, linears, float outputs, symmetric, entropy": _static(
        "Entropy", _SYMMETRIC, **_LINEARS
    ),
    "ModelOpt, its defaults (entropy, the rest fp16)": _modelopt(),
    "ModelOpt, max, the rest fp16": _modelopt(calibration_method="max"),
    "ModelOpt, entropy, the rest fp32": _modelopt(high_precision_dtype="fp32"),
    "ModelOpt, Add excluded, entropy, the rest fp16": _modelopt(op_types_to_exclude=["Add"]),
    "ModelOpt, Add excluded, entropy, the rest fp32": _modelopt(
        op_types_to_exclude=["Add"], high_precision_dtype="fp32"
    ),
    "ModelOpt, Add excluded, max, the rest fp32": _modelopt(
        op_types_to_exclude=["Add"], calibration_method="max", high_precision_dtype="fp32"
    ),
}


def export_stock(checkpoint: Checkpoint, target: pathlib.Path) -> None:
    """Write transformers' model as torch's exporter makes it, without ``value_info``.

    Inputs are int64 (batch, seq), up to 64 rows and as many tokens as the model has positions.
    """
    import torch

    model, outputs = checkpoint.eager_model(), checkpoint.task.output_names

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            found = self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )
            return tuple(found[name] for name in outputs)

    limit = checkpoint.architecture.max_position_embeddings
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq", min=2, max=limit)}
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            Outputs().eval(),
            # three tensors, not one thrice: the tracer would take equal objects for one input
            tuple(torch.ones(2, 16, dtype=torch.int64) for _ in INPUT_NAMES),
            dynamo=True,
            input_names=list(INPUT_NAMES),
            output_names=list(outputs),
            dynamic_shapes=(axes,) * len(INPUT_NAMES),
            verbose=False,
        )
        program.save(str(target))
    graph = onnx.load(target)
    del graph.graph.value_info[:]
    onnx.save(graph, target)


def grouped_linears(graph: pathlib.Path) -> tuple[str, ...]:
    """Names of the MatMuls whose weight has three axes: (groups, in, out)."""
    return _products(graph, lambda axes: 3 in axes)


def attention_products(graph: pathlib.Path) -> tuple[str, ...]:
    """Names of the MatMuls without a weight."""
    return _products(graph, lambda axes: not axes)


def _products(graph: pathlib.Path, wanted: Callable[[Sequence[int]], bool]) -> tuple[str, ...]:
    """MatMuls chosen by how many axes each of their weights has."""
    model = onnx.load(graph)
    axes = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and wanted([axes[name] for name in node.input if name in axes])
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers print and warn about each step; their errors still get through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
