"""How fast this machine multiplies matrices and reads memory: the ceiling of every engine.

Rates are the best of several libraries, sizes and repetitions: a ceiling is what the machine did
at least once. Everything runs with the number of threads that the candidates run with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .refusal import CannotRun
from .transformers_model import versions

#: rows, inner, columns: products of a feed-forward block of the published sizes, and a large one.
_SIZES = ((128, 768, 3072), (512, 3072, 768), (1024, 2048, 2048))
_BUDGET_S = 0.25
_MIN_REPEATS = 3
_MIN_BUFFER, _MAX_BUFFER = 256 << 20, 2 << 30


def load(settings: dict[str, Any]) -> Machine:
    return Machine(settings)


class Machine:
    arithmetic, weights_bytes = "fp32", 0
    notes: tuple[str, ...] = ()

    def __init__(self, settings: dict[str, Any]) -> None:
        self._threads, self._device = settings["threads"], settings["device"]
        self.versions = versions("numpy", "torch", "onnxruntime")
        try:
            import torch
        except ImportError:
            return
        torch.set_num_threads(self._threads)
        torch.set_grad_enabled(False)

    def ceiling(self, buffer_bytes: int) -> dict[str, Any]:
        """Rates in GFLOP/s (a multiply-add counts as two) and GB/s (10^9 bytes), None where no
        library here can; ``_by`` names what reached it."""
        best: dict[str, Any] = {}
        for arithmetic in ("fp32", "bf16", "fp16", "int8"):
            best[f"gemm_{arithmetic}_gflops"] = best[f"gemm_{arithmetic}_by"] = None
            if arithmetic == "fp16" and self._device == "cpu":
                continue  # CPU engines of this type compute in float32
            for rows, inner, columns in _SIZES:
                for library, call in self._products(arithmetic, rows, inner, columns):
                    rate = 2e-9 * rows * inner * columns / self._fastest_s(call)
                    if rate > (best[f"gemm_{arithmetic}_gflops"] or 0):
                        best[f"gemm_{arithmetic}_gflops"] = rate
                        best[f"gemm_{arithmetic}_by"] = f"{library} {rows}x{inner}x{columns}"
        size = min(max(buffer_bytes, _MIN_BUFFER), _MAX_BUFFER)
        return best | self._bandwidth(size) | {"buffer_bytes": size, "threads": self._threads}

    def _fastest_s(self, call: Callable[[], Any]) -> float:
        """Shortest time of a call, of at least three and for a quarter of a second; of two where
        one takes that long by itself (a library without a kernel for this CPU)."""
        self._timed(call)
        fastest, spent, done = self._timed(call), 0.0, 0
        if fastest > 2 * _BUDGET_S:
            return fastest
        while done < _MIN_REPEATS or spent < _BUDGET_S:
            elapsed = self._timed(call)
            fastest, spent, done = min(fastest, elapsed), spent + elapsed, done + 1
        return fastest

    def _timed(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _products(
        self, arithmetic: str, rows: int, inner: int, columns: int
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Products that run here; one that a library or this CPU lacks is left out."""
        candidates = [_torch_product(arithmetic, rows, inner, columns, self._device)]
        if self._device == "cpu":
            candidates.append(_ort_product(arithmetic, rows, inner, columns, self._threads))
            candidates.append(_numpy_product(arithmetic, rows, inner, columns))
        for name, make in candidates:
            try:
                call = make()
                call()
            except Exception:  # absent library or kernel: whatever it raises, it is not a rate
                continue
            yield name, call

    def _bandwidth(self, size: int) -> dict[str, float]:
        try:
            import torch
        except ImportError:
            source = np.ones(size // 4, np.float32)
            target = np.empty_like(source)
            read = self._fastest_s(source.max)
            copy = self._fastest_s(lambda: np.copyto(target, source))
            return {"read_gb_s": size / read / 1e9, "copy_gb_s": 2 * size / copy / 1e9}
        source = torch.ones(size // 4, device=self._device)
        target = torch.empty_like(source)
        matrix = source.view(-1, 1024)
        vector = torch.ones(1024, device=self._device)
        # A product with a vector is how weights are read at batch 1; which is faster varies.
        read = min(self._fastest_s(source.sum), self._fastest_s(lambda: torch.mv(matrix, vector)))
        copy = self._fastest_s(lambda: target.copy_(source))
        return {"read_gb_s": size / read / 1e9, "copy_gb_s": 2 * size / copy / 1e9}


def _torch_product(arithmetic: str, m: int, k: int, n: int, device: str) -> tuple[str, Any]:
    def make() -> Callable[[], Any]:
        import torch

        if arithmetic == "int8":
            a = torch.randint(-127, 127, (m, k), dtype=torch.int8, device=device)
            b = torch.randint(-127, 127, (n, k), dtype=torch.int8, device=device).t()
            return lambda: torch._int_mm(a, b)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arithmetic]
        linear = torch.nn.Linear(k, n, bias=False).to(device, dtype)
        a = torch.randn(m, k).to(device, dtype)
        return lambda: torch.nn.functional.linear(a, linear.weight)

    return "torch", make


def _ort_product(arithmetic: str, m: int, k: int, n: int, threads: int) -> tuple[str, Any]:
    def make() -> Callable[[], Any]:
        import onnx
        import onnxruntime as ort  # noqa: TID251  its own rate, not an engine's

        rng = np.random.default_rng(0)
        x = rng.standard_normal((m, k), np.float32)
        if arithmetic == "fp32":
            weights = {"w": rng.standard_normal((k, n), np.float32)}
            node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        elif arithmetic == "int8":
            weights = {
                "w": rng.integers(-127, 127, (k, n), np.int8),
                "scale": np.ones(n, np.float32),
            }
            node = onnx.helper.make_node(
                "DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft"
            )
        else:
            raise CannotRun(f"ONNX Runtime has no {arithmetic} product on CPUs")
        infos = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in ("x", "y")
        ]
        graph = onnx.helper.make_graph(
            [node],
            "product",
            infos[:1],
            infos[1:],
            [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, {"x": x})

    return "ONNX Runtime", make


def _numpy_product(arithmetic: str, m: int, k: int, n: int) -> tuple[str, Any]:
    def make() -> Callable[[], Any]:
        if arithmetic != "fp32":
            raise CannotRun(f"numpy has no {arithmetic} product")
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
        return lambda: a @ b

    return "numpy", make
