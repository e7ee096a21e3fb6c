"""HalfTables: what is looked up is stored in float16, what is computed with is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.passes.half_tables import HalfTables

ROWS, WIDTH = 600, 128
TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[N] ids, float[N, 128] x) => (float[N, 128] found, float[N, 600] scores)
{
    rows = Gather <axis = 0> (table, ids)
    found = Identity (rows)
    turned = Transpose <perm = [1, 0]> (TIED)
    scores = MatMul (x, turned)
}
"""


def graph(tied: bool = False, largest: float = 1.0) -> onnx.ModelProto:
    """tied: the table looked up is multiplied with too. largest: a number in it."""
    model = onnx.parser.parse_model(TEXT.replace("TIED", "table" if tied else "other"))
    random = np.random.default_rng(0)
    for name in ("table",) if tied else ("table", "other"):
        values = random.standard_normal((ROWS, WIDTH)).astype(np.float32)
        values[3, 5] = largest
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def halved(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    result = HalfTables()(ir.from_proto(model))
    return ir.to_proto(result.model), result.modified


def test_a_table_that_is_looked_up_takes_half_the_bytes():
    before = graph()
    after, modified = halved(before)
    assert modified
    types = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
    assert types == {"table": TensorProto.FLOAT16, "other": TensorProto.FLOAT}
    batch = {"ids": np.int64([3, 599]), "x": np.ones((2, WIDTH), np.float32)}
    found = {}
    for name, model in (("before", before), ("after", after)):
        with OnnxRuntimeRunner.from_model(model) as runner:
            found[name] = runner.infer(batch)
    rounded = found["before"]["found"].astype(np.float16).astype(np.float32)
    assert np.array_equal(found["after"]["found"], rounded)
    assert found["after"]["found"].dtype == np.float32
    assert halved(after)[1] is False, "pass twice is pass once"


@pytest.mark.parametrize("kept", [{"tied": True}, {"largest": 70000.0}])
def test_what_is_multiplied_with_or_too_large_stays(kept):
    before = graph(**kept)
    after, modified = halved(before)
    assert not modified
    assert {t.data_type for t in after.graph.initializer} == {TensorProto.FLOAT}


def test_rows_that_are_an_output_stay():
    before = graph()
    before.graph.output.append(onnx.helper.make_tensor_value_info("rows", TensorProto.FLOAT, None))
    assert halved(before)[1] is False
