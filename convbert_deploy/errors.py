"""Every error a user can cause or cure.

``ConvBertDeployError`` and its children carry what happened, the value seen and what was expected
in ``message``, and the command that helps in ``hint``. The command line prints both and exits 3;
anything else that escapes is a bug of ours and keeps its traceback. A failed comparison is not an
exception: it is a report whose ``passed`` is False (exit 1).
"""

from __future__ import annotations

import sys


class ConvBertDeployError(Exception):
    """Something the user can fix. ``str(error)`` is the message alone; ``hint`` may be None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(ConvBertDeployError):
    """Unreadable weights, not a ConvBERT, missing, extra or mis-shaped tensors, unusable config."""


class GraphError(ConvBertDeployError):
    """An ONNX file that cannot be read, is not ours, or breaks a pass's contract."""


class ShapeError(ConvBertDeployError):
    """A malformed shape profile, or an input outside it."""


class InputError(ConvBertDeployError):
    """A request that cannot be scored: ids, mask, dtype, padding or text out of bounds."""


class PluginError(ConvBertDeployError):
    """A native library that is not built, not loadable or refused by its runtime."""


class EngineError(ConvBertDeployError):
    """A build that failed, a bundle that is damaged or was built for something else."""


class OutputError(ConvBertDeployError):
    """The result could not be written (disk full, no permission); nothing partial is left."""


class MissingDependencyError(ConvBertDeployError):
    """A package that an optional feature needs and that is not installed, or that is and cannot be
    imported: raised while the ImportError is handled, its message says which."""

    def __init__(self, package: str, *, needed_for: str, extra: str) -> None:
        failure = sys.exc_info()[1]
        broken = isinstance(failure, ImportError) and not isinstance(failure, ModuleNotFoundError)
        problem = f"cannot be imported: {failure}" if broken else "is not installed"
        super().__init__(
            f"{needed_for} needs the package {package}, which {problem}",
            hint=f"pip install 'convbert-deploy[{extra}]'",
        )
