"""Three deployments, one for each of Triton's backends that we use."""

from __future__ import annotations

from convbert_deploy.triton.deployment import DeploymentFacts

CPU = DeploymentFacts(
    "tagger",
    "python",
    "0.1.0",
    golden_text='{"text": "It\'s $5."}',
    runtime="onnxruntime==1.31.1",
)
PLAN = DeploymentFacts(
    "My_Model.v2",
    "tensorrt",
    "0.1.0.dev3",
    tensorrt_version="10.13.3.9",
    needs_gpu=True,
    plugin_library="libplugins.so",
    model_bytes=425 << 20,
    http_port=9000,
    grpc_port=9001,
    metrics_port=9002,
    triton_image="registry.example:5000/tritonserver:26.07-py3",
    image="registry.example:5000/nlp/model:7",
)
GRAPH = DeploymentFacts(
    "reader", "onnxruntime", "1.0", needs_gpu=True, plugin_library="libops.so", repository="repo"
)
ALL = {"cpu": CPU, "plan": PLAN, "graph": GRAPH}
