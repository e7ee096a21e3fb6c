"""One self-contained page from the JSON of ``bench`` or ``profile``: no script, no request."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from convbert_deploy.errors import ConvBertDeployError

__all__ = ["html_text", "read_result", "write_html"]

_HINT = "convbert-deploy bench ENGINE --json FILE or profile ENGINE --json > FILE writes one"
#: What every result of a kind has; later additions may be absent.
_NEEDED = {
    "benchmark": ("baseline", "header", "measurements", "options", "warnings"),
    "profile": ("batch", "engine", "groups", "header", "not_fused", "operators", "sections", "seq"),
}


def write_html(
    report_json: Mapping[str, Any], target: pathlib.Path, profile: Mapping[str, Any] | None = None
) -> None:
    """Write the page of a result.

    Args:
        report_json: ``to_json()`` of a BenchmarkReport or of a ProfileReport, or a file of it.
        profile: of one of the engines, shown in a benchmark's page.

    Raises:
        ConvBertDeployError: not such a result.
        MissingDependencyError: matplotlib is not installed.
        OutputError: the page could not be written.
    """
    from convbert_deploy.provenance import atomic_file

    text = html_text(report_json, profile)
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def html_text(report_json: Mapping[str, Any], profile: Mapping[str, Any] | None = None) -> str:
    """The page itself; arguments and errors as ``write_html``'s."""
    from convbert_deploy.report_html.benchmark_page import benchmark_page
    from convbert_deploy.report_html.profile_page import profile_page

    if _checked(report_json) == "profile":
        return profile_page(report_json)
    if profile is not None and _checked(profile) != "profile":
        raise ConvBertDeployError(
            "the result to show beside the benchmark is a benchmark too, expected a profile",
            hint="convbert-deploy profile ENGINE --json > FILE writes one",
        )
    return benchmark_page(report_json, profile)


def read_result(path: pathlib.Path) -> dict[str, Any]:
    """The JSON of ``bench`` or ``profile`` in a file.

    Raises:
        ConvBertDeployError: no such file, no JSON, or another kind of result.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvBertDeployError(f"cannot read {path}: {error.strerror}", hint=_HINT) from error
    except ValueError as error:
        raise ConvBertDeployError(f"{path} is not JSON: {error}", hint=_HINT) from error
    _checked(found, str(path))
    return found


def _checked(result: Any, name: str = "this") -> str:
    """The kind of a result."""
    kind = result.get("kind") if isinstance(result, Mapping) else None
    if kind not in _NEEDED:
        raise ConvBertDeployError(
            f"{name} is not a result of bench or profile: its kind is {kind!r}", hint=_HINT
        )
    absent = [key for key in _NEEDED[kind] if key not in result]
    if absent:
        raise ConvBertDeployError(f"{name} is a {kind} without {', '.join(absent)}", hint=_HINT)
    return kind
