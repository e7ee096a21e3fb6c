"""Triton python model: token ids in, an engine bundle's outputs out.

Every request is checked on its own; a bad one never fails its batch-mates.
"""

import contextlib
import json
import pathlib

import triton_python_backend_utils as pb_utils

from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.engine import Engine
from convbert_deploy.triton.serving_models import EngineModel, Failure


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        threads = config["parameters"].get("threads", {}).get("string_value")
        self._inputs = [entry["name"] for entry in config["input"]]
        self._open = contextlib.ExitStack()
        engine = Engine.load(
            pathlib.Path(args["model_repository"], args["model_version"], "engine")
        )
        options = RunnerOptions(
            threads=int(threads) if threads else None,
            device=int(args["model_instance_device_id"] or 0),
        )
        self._model = EngineModel(self._open.enter_context(engine.runner(options)), engine)

    def execute(self, requests):
        return [
            _response(answer) for answer in self._model.answer(list(map(self._batch, requests)))
        ]

    def finalize(self):
        self._open.close()

    def _batch(self, request):
        tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs]
        return {
            name: tensor.as_numpy()
            for name, tensor in zip(self._inputs, tensors, strict=True)
            if tensor is not None
        }


def _response(answer):
    if isinstance(answer, Failure):
        code = pb_utils.TritonError.INVALID_ARG if answer.invalid else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(answer.message, code))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, out) for name, out in answer.items()])
