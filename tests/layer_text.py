"""One encoder layer as ONNX text, small enough to read, for tests that change a line of it.

hidden 8, two heads of 2, kernel size 3, intermediate 12.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "convbert" : 1]>
layer (float[B, S, 8] hidden, int64[B, S] attention_mask) => (float[B, S, 8] last)
{
    keep = Cast <to = 1> (attention_mask)
    pads = Sub (one, keep)
    added = Mul (pads, minus)
    additive = Unsqueeze (added, one_and_two)
    projected = MatMul (hidden, w_projections)
    projections = Add (projected, b_projections)
    q, k, v, c = Split <axis = 2, num_outputs = 4> (projections)
    spans = convbert.DepthwiseConv1D (hidden, taps)
    pointed = MatMul (spans, w_pointwise)
    key = Add (pointed, b_pointwise)
    product = Mul (key, q)
    generated = MatMul (product, w_generator)
    logits = Add (generated, b_generator)
    convolved = convbert.SpanDynamicConv <kernel_size = 3, num_heads = 2> (c, logits)
    q_split = Reshape (q, heads)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k_split = Reshape (k, heads)
    k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
    scores = MatMul (q_heads, k_heads)
    scaled = Div (scores, root)
    masked = Add (scaled, additive)
    weights = Softmax <axis = -1> (masked)
    v_split = Reshape (v, heads)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
    by_head = MatMul (weights, v_heads)
    in_rows = Transpose <perm = [0, 2, 1, 3]> (by_head)
    context = Reshape (in_rows, joined)
    mixed = Concat <axis = -1> (context, convolved)
    attended = MatMul (mixed, w_attention_output)
    attention = Add (attended, b_attention_output)
    attention_sum = Add (attention, hidden)
    normed = LayerNormalization <axis = -1, epsilon = 1e-12> (attention_sum, g_attention, s_attention)
    raised = MatMul (normed, w_up)
    up = Add (raised, b_up)
    activated = Gelu <approximate = "none"> (up)
    lowered = MatMul (activated, w_down)
    down = Add (lowered, b_down)
    output_sum = Add (down, normed)
    last = LayerNormalization <axis = -1, epsilon = 1e-12> (output_sum, g_output, s_output)
}
"""

_MATRICES = {
    "projections": (8, 16),
    "pointwise": (8, 4),
    "generator": (4, 6),
    "attention_output": (8, 8),
    "up": (8, 12),
    "down": (12, 8),
}


def layer_model(text: str = TEXT, seed: int = 0) -> onnx.ModelProto:
    """The parsed text with weights of the size of trained ones, and the operators' functions."""
    from convbert_deploy.operators import functions_of

    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    values = {
        "one": np.float32(1),
        "minus": np.float32(-30000),
        "root": np.float32(np.sqrt(2)),
        "one_and_two": np.int64([1, 2]),
        "heads": np.int64([0, 0, 2, 2]),
        "joined": np.int64([0, 0, 4]),
        "taps": normal(3, 8),
    }
    for name, (rows, columns) in _MATRICES.items():
        values[f"w_{name}"] = normal(rows, columns) / np.sqrt(np.float32(rows))
        values[f"b_{name}"] = normal(columns) / 10
    for name in ("attention", "output"):
        values[f"g_{name}"], values[f"s_{name}"] = 1 + normal(8) / 10, normal(8) / 10
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in values.items()]
    model.graph.initializer.extend(tensors)
    model.functions.extend(functions_of(model, 20))
    return model


def layer_batch(seed: int = 1) -> dict[str, np.ndarray]:
    """Three texts of 5, 3 and 1 tokens, padded to 5."""
    hidden = np.random.default_rng(seed).standard_normal((3, 5, 8)).astype(np.float32)
    mask = (np.arange(5) < np.array([[5], [3], [1]])).astype(np.int64)
    return {"hidden": hidden, "attention_mask": mask}
