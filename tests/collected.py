"""A small graph and samples to collect statistics from."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.calibration.collect import CollectOptions
from convbert_deploy.calibration.samples import CalibrationSamples, SampleRow

GRAPH = "a" * 64
VOCABULARY, HIDDEN = 100, 24
#: rows of the embedding table that hold them; no other id does
NAN_ID, INFINITY_ID = 97, 98
TENSORS = ("hidden", "relu", "pooled", "logits")
#: several batches of these samples, none of the whole
SMALL = CollectOptions(max_bytes=8 << 10, save_every=3, threads=1)


def embeddings() -> np.ndarray:
    table = np.random.default_rng(5).standard_t(4, size=(VOCABULARY, HIDDEN)).astype(np.float32)
    table[NAN_ID, 3], table[INFINITY_ID, 7] = np.nan, -np.inf
    return table


def make_graph(rank: int = 2) -> onnx.ModelProto:
    """Embeddings, and what is exact to compute from them; ``scores`` grows with length squared."""
    axes = ["batch", "choices", "seq"] if rank == 3 else ["batch", "seq"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, axes)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    flat = "flat_ids" if rank == 3 else "input_ids"
    nodes = [
        helper.make_node("Gather", ["table", flat], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["relu"]),
        helper.make_node("ReduceMax", ["relu", "axis"], ["pooled"], keepdims=0),
        helper.make_node("Transpose", ["hidden"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["hidden", "turned"], ["scores"]),
        helper.make_node("MatMul", ["pooled", "classifier"], ["logits"]),
    ]
    weights = {
        "table": embeddings(),
        "classifier": np.eye(HIDDEN, 3, dtype=np.float32),
        "axis": np.array([1]),
    }
    if rank == 3:
        nodes.insert(0, helper.make_node("Reshape", ["input_ids", "rows"], ["flat_ids"]))
        nodes.insert(0, helper.make_node("Concat", ["minus", "length"], ["rows"], axis=0))
        nodes.insert(0, helper.make_node("Shape", ["input_ids"], ["length"], start=2))
        weights["minus"] = np.array([-1])
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def row_of(number: int, ids, mask=None) -> SampleRow:
    ids = np.asarray(ids, np.int64)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
    return SampleRow(
        number, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    )


def make_samples(count: int = 40, *, seed: int = 0, longest: int = 12) -> CalibrationSamples:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, count)
    rows = [row_of(n, random.integers(0, 90, length)) for n, length in enumerate(lengths, 1)]
    return CalibrationSamples("texts.jsonl", "line", tuple(rows))


def hidden_rows(samples: CalibrationSamples) -> np.ndarray:
    return np.concatenate([embeddings()[row.inputs["input_ids"]] for row in samples.rows])
