"""What a Triton model repository needs around it to be started, watched and drained.

``write_deployment`` puts a start script, an image, a compose file, KServe manifests and a Helm chart
beside a model repository; every value in them comes from ``DeploymentFacts``.
"""

from convbert_deploy.triton.deployment.facts import DeploymentFacts, facts_of
from convbert_deploy.triton.deployment.writing import write_deployment

__all__ = ["DeploymentFacts", "facts_of", "write_deployment"]
