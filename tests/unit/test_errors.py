"""What errors say."""

from __future__ import annotations

from convbert_deploy.errors import MissingDependencyError


def test_a_package_that_cannot_be_imported_is_not_called_missing():
    try:
        raise ImportError("pyarrow requires NumPy 2.0 or newer")
    except ImportError:
        broken = MissingDependencyError("pyarrow", needed_for="Parquet", extra="bulk")
    assert str(broken).endswith("which cannot be imported: pyarrow requires NumPy 2.0 or newer")
    try:
        raise ModuleNotFoundError("No module named 'pyarrow'")
    except ImportError:
        missing = MissingDependencyError("pyarrow", needed_for="Parquet", extra="bulk")
    assert str(missing).endswith("which is not installed")
    assert missing.hint == "pip install 'convbert-deploy[bulk]'"
