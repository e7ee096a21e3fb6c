"""Triton python model: requests in words in, answers out; the engine is another Triton model.

Tokenizing, cutting, windows and decoding are the Scorer's, as everywhere else.
"""

import json
import pathlib

import numpy as np
import triton_python_backend_utils as pb_utils

from convbert_deploy.errors import EngineError
from convbert_deploy.triton.serving_models import Failure, TextModel, described_engine


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._engine_name = config["parameters"]["engine_model"]["string_value"]
        # The engine that was packaged with this version, while another is being loaded.
        self._version = int(args["model_version"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        engine = described_engine(
            pathlib.Path(args["model_repository"], args["model_version"], "engine")
        )
        self._output_names = list(engine.manifest.task.output_names)
        self._model = TextModel(engine, self._infer)

    def execute(self, requests):
        arrays = [
            pb_utils.get_input_tensor_by_name(request, self._input).as_numpy()
            for request in requests
        ]
        answers = self._model.answer([array.reshape(-1).tolist() for array in arrays])
        return [
            self._response(answer, array.shape)
            for answer, array in zip(answers, arrays, strict=True)
        ]

    def _infer(self, batch):
        """Ask the engine's model; its outputs come in the server's own memory."""
        request = pb_utils.InferenceRequest(
            model_name=self._engine_name,
            model_version=self._version,
            requested_output_names=self._output_names,
            inputs=[pb_utils.Tensor(name, array) for name, array in batch.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(
                f"model {self._engine_name}, version {self._version}: {response.error().message()}"
            )
        return {
            name: pb_utils.get_output_tensor_by_name(response, name).as_numpy()
            for name in self._output_names
        }

    def _response(self, answer, shape):
        if isinstance(answer, Failure):
            error = pb_utils.TritonError
            code = error.INVALID_ARG if answer.invalid else error.INTERNAL
            return pb_utils.InferenceResponse(error=error(answer.message, code))
        values = np.array(answer, dtype=np.object_).reshape(shape)
        return pb_utils.InferenceResponse([pb_utils.Tensor(self._output, values)])
