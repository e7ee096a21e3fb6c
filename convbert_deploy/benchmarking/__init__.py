"""How fast engines and peers are, and how close to what the machine allows.

``rounds`` measures anything that can be asked to run; ``process`` and ``worker`` put a candidate
into a process of its own; ``peers`` and ``peer_environments`` say what the peers are and install
them; ``floor`` holds the shortest possible time; ``bench`` puts it all together.
"""

from convbert_deploy.benchmarking.cases import Case, Point, Workload
from convbert_deploy.benchmarking.measurement import BenchmarkReport, CandidateFacts, Measurement
from convbert_deploy.benchmarking.options import BenchOptions
from convbert_deploy.benchmarking.rounds import Candidate, WallTimer, measure, measure_cases, turn

__all__ = [
    "BenchOptions",
    "BenchmarkReport",
    "Candidate",
    "CandidateFacts",
    "Case",
    "Measurement",
    "Point",
    "WallTimer",
    "Workload",
    "measure",
    "measure_cases",
    "turn",
]
