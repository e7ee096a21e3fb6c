"""Other forms of the same layers, for ``plan_facts.py`` to build: what TensorRT makes of them.

Each takes the typed graph that our kernels run and returns a rewritten copy with the same answers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

#: ``Attention`` is new in it
ATTENTION_OPSET = 23


class Rewriting:
    """A copy of a graph whose nodes are replaced one group at a time."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self._makers = {output: node for node in self.graph.node for output in node.output}
        self._gone: list[onnx.NodeProto] = []
        self._new: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]] = []

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == op_type]

    def maker(self, name: str) -> onnx.NodeProto:
        return self._makers[name]

    def reader(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if name in node.input)

    def weight(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.weights[name])

    def constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
            self.graph.initializer.append(self.weights[name])
        return name

    def replace(self, gone: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
        """``new`` stands where the last of ``gone`` stood."""
        self._gone += gone
        self._new.append((gone[-1], new))

    def done(self) -> onnx.ModelProto:
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            nodes += next((new for place, new in self._new if place is node), [])
            if not any(node is other for other in self._gone):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                nodes.append(copy)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return self.model


def onnx_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Scores, softmax and context as one ``Attention`` node with the additive mask, on the
    projections as they are: no Reshape or Transpose by head is left."""
    graph = Rewriting(model)
    for softmax in graph.nodes("Softmax"):
        masked = graph.maker(softmax.input[0])
        scaled = graph.maker(masked.input[0])
        scores = graph.maker(scaled.input[0])
        context = graph.reader(softmax.output[0])
        turned = [graph.maker(name) for name in (*scores.input, context.input[1])]
        by_head = [graph.maker(node.input[0]) for node in turned]
        back = graph.reader(context.output[0])
        joined = graph.reader(back.output[0])
        heads = int(graph.weight(by_head[0].input[1])[2])
        node = helper.make_node(
            "Attention",
            [*(node.input[0] for node in by_head), masked.input[1]],
            [joined.output[0]],
            name=f"{softmax.name}/Attention",
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=1 / float(graph.weight(scaled.input[1])),
        )
        inner = [scores, scaled, masked, softmax, context, back, joined]
        graph.replace([*by_head, *turned, *inner], [node])
    for opset in graph.model.opset_import:
        if opset.domain == "":
            opset.version = ATTENTION_OPSET
    graph.model.ir_version = 11
    return graph.done()


def heads_turned_once(model: onnx.ModelProto) -> onnx.ModelProto:
    """One Reshape and Transpose of all projections by head, split after that."""
    graph = Rewriting(model)
    for softmax in graph.nodes("Softmax"):
        scores = graph.maker(graph.maker(graph.maker(softmax.input[0]).input[0]).input[0])
        context = graph.reader(softmax.output[0])
        turned = [graph.maker(name) for name in (*scores.input, context.input[1])]
        by_head = [graph.maker(node.input[0]) for node in turned]
        source = graph.maker(by_head[0].input[0]).input[0]
        _, _, heads, head_dim = graph.weight(by_head[0].input[1])
        name = f"{softmax.name}/heads"
        target = np.array([0, 0, 4 * heads, head_dim], np.int64)
        shape = graph.constant("all_heads", target)
        new = [
            helper.make_node("Reshape", [source, shape], [f"{name}/r"], name=f"{name}/r"),
            helper.make_node(
                "Transpose", [f"{name}/r"], [f"{name}/t"], name=f"{name}/t", perm=[0, 2, 1, 3]
            ),
            helper.make_node(
                "Split",
                [f"{name}/t"],
                [turned[0].output[0], f"{name}/k", turned[2].output[0], f"{name}/unread"],
                name=f"{name}/s",
                axis=1,
                num_outputs=4,
            ),
            helper.make_node(
                "Transpose",
                [f"{name}/k"],
                [turned[1].output[0]],
                name=f"{name}/kt",
                perm=[0, 1, 3, 2],
            ),
        ]
        # the scores stand before the value's Transpose: all move up to where the query's was
        graph.replace([*by_head, turned[1], turned[2], turned[0]], new)
    return _sorted(graph.done())


def separate_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Key and value by products of their own; query and convolution, which one kernel of ours reads
    together, by one."""
    graph = Rewriting(model)
    for fused in graph.nodes("FusedSpanDynamicConv"):
        add = graph.maker(fused.input[1])
        product = graph.maker(add.input[0])
        split = next(n for n in graph.nodes("Split") if n.input[0] == add.output[0])
        weight, bias = graph.weight(product.input[1]), graph.weight(add.input[1])
        width = weight.shape[1] // 4
        new = []
        for parts in ([0, 3], [1], [2]):
            name = f"{product.name}/{''.join(map(str, parts))}"
            columns = np.concatenate([np.arange(p * width, (p + 1) * width) for p in parts])
            w = graph.constant(f"{name}/w", weight[:, columns])
            b = graph.constant(f"{name}/b", bias[columns])
            whole = split.output[parts[0]] if len(parts) == 1 else f"{name}/out"
            new += [
                helper.make_node("MatMul", [product.input[0], w], [name], name=name),
                helper.make_node("Add", [name, b], [whole], name=f"{name}/add"),
            ]
            if len(parts) == 2:
                outputs = [split.output[part] for part in parts]
                new.append(
                    helper.make_node(
                        "Split", [whole], outputs, name=f"{name}/s", axis=-1, num_outputs=2
                    )
                )
                fused.input[1] = whole
                for attribute in fused.attribute:
                    if attribute.name == "value_offset":
                        attribute.i = width
        graph.replace([product, add, split], new)
    return graph.done()


def no_concat(model: onnx.ModelProto) -> onnx.ModelProto:
    """The attention output as the sum of two products, one for each half of its input."""
    graph = Rewriting(model)
    for concat in graph.nodes("Concat"):
        product = graph.reader(concat.output[0])
        weight = graph.weight(product.input[1])
        halves = [f"{product.name}/{i}" for i in range(2)]
        new = [
            helper.make_node(
                "MatMul", [source, graph.constant(f"{half}/w", part)], [half], name=half
            )
            for half, source, part in zip(halves, concat.input, np.split(weight, 2), strict=True)
        ]
        new.append(helper.make_node("Add", halves, [product.output[0]], name=f"{product.name}/sum"))
        graph.replace([concat, product], new)
    return graph.done()


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes in topological order, otherwise as they were."""
    known = {value.name for value in model.graph.input}
    known |= {tensor.name for tensor in model.graph.initializer}
    waiting, nodes = list(model.graph.node), []
    while waiting:
        ready = next(n for n in waiting if all(not name or name in known for name in n.input))
        waiting.remove(ready)
        known.update(ready.output)
        nodes.append(ready)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


VARIANTS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "ONNX Attention, opset 23": onnx_attention,
    "one Transpose for all heads": heads_turned_once,
    "key and value by products of their own": separate_products,
    "attention output without Concat": no_concat,
}
