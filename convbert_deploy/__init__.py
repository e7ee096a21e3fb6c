"""ConvBERT in production: export, build engines, prove them equal, time them, ask them.

The same verbs as the command line::

    import convbert_deploy as cd

    checkpoint = cd.Checkpoint.load("base.pt")
    cd.export(checkpoint, Path("base.onnx"))
    engine = cd.build_engine(cd.Graph.load("base.onnx"), Path("base.fp16.engine"),
                             cd.BuildOptions(precision=cd.Precision.FP16))
    assert cd.verify(engine, checkpoint).passed
    cd.calibrate(Path("base.onnx"), Path("texts.jsonl"), Path("base.int8.onnx"),
                 cd.CalibrateOptions(budget=cd.Budget.parse("agreement >= 99%")))
    print(cd.evaluate(engine, Path("labelled.jsonl"), checkpoint).metrics)
    with cd.open_scorer(engine) as scorer:
        print(scorer.score([cd.TextRequest("a fine film")]))

Names are imported when first used: importing the package loads neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Architecture": "architecture",
    "Task": "architecture",
    "Checkpoint": "checkpoint",
    "CheckpointOptions": "checkpoint",
    "ConvBertDeployError": "errors",
    "ExportOptions": "exporting",
    "export": "exporting",
    "Graph": "graph",
    "Precision": "precision",
    "ShapeProfile": "shapes",
    "BuildOptions": "build",
    "build_engine": "build",
    "Engine": "engine",
    "RunnerOptions": "backends.base",
    "VerifyOptions": "verification",
    "verify": "verification",
    "EvaluateOptions": "evaluation.evaluating",
    "evaluate": "evaluation.evaluating",
    "Evaluator": "evaluation.compare",
    "read_labelled": "evaluation.labelled",
    "CalibrateOptions": "calibration.calibrating",
    "calibrate": "calibration.calibrating",
    "CalibrationTable": "calibration.table",
    "SmoothingOptions": "calibration.smoothing",
    "Budget": "calibration.budget",
    "BenchRequest": "benchmarking.bench",
    "bench": "benchmarking.bench",
    "ProfileOptions": "profiling.profiling",
    "profile": "profiling.profiling",
    "write_html": "report_html",
    "inspect": "inspection",
    "doctor": "diagnosis",
    "demo": "demonstration",
    "run": "serving.answering",
    "TritonOptions": "triton.repository",
    "package_triton": "triton.repository",
    "ProbeOptions": "serving.probe",
    "Expectation": "serving.probe",
    "probe": "serving.probe",
    "LoadOptions": "serving.load",
    "load": "serving.load",
    "BulkOptions": "bulk_scoring.options",
    "bulk": "bulk_scoring.job",
    "open_scorer": "serving.answering",
    "TextRequest": "serving.requests",
    "WordsRequest": "serving.requests",
    "QuestionRequest": "serving.requests",
    "ChoiceRequest": "serving.requests",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"convbert_deploy.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'convbert_deploy' has no attribute {name!r}")
