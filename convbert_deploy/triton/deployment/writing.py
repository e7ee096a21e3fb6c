"""Templates to files: ``@name@`` is a fact, a line that ends in ``#@flag`` stands where it holds.

Shell, YAML, Dockerfiles and Helm's own ``{{ }}`` use neither mark, so one small language does for
all of them.
"""

from __future__ import annotations

import importlib.resources
import pathlib
import re
from collections.abc import Iterator, Mapping

from convbert_deploy.provenance import atomic_file
from convbert_deploy.triton.deployment.facts import DeploymentFacts

_CONDITION = re.compile(r"[ \t]*#@(!?)([a-z_]+)$")
_NAME = re.compile(r"@([a-z_]+)@")
#: written under another name, because packaging tools drop or obey the real one
_RENAMED = {"dockerignore": ".dockerignore", "helm/helmignore": "helm/.helmignore"}


def write_deployment(target: pathlib.Path, facts: DeploymentFacts) -> list[pathlib.PurePosixPath]:
    """Write the deployment files into ``target``, beside its folder ``facts.repository``.

    Existing files of the same names are replaced, each at once. Files: ``run.sh`` (executable),
    ``Dockerfile``, ``docker-compose.yaml``, ``kserve/``, ``helm/`` and a ``README.md``.

    Returns:
        The paths written, relative to ``target``, sorted.

    Raises:
        OutputError: the folder is not writable or the disk is full.
    """
    values, flags = facts.values(), facts.flags()
    written = []
    for name, text in sorted(_templates()):
        path = pathlib.PurePosixPath(_RENAMED.get(name, name))
        with atomic_file(target / path) as temporary:
            temporary.write_text(render(text, values, flags), encoding="utf-8")
        if path.suffix == ".sh":
            (target / path).chmod(0o755)
        written.append(path)
    return sorted(written)


def render(text: str, values: Mapping[str, str], flags: Mapping[str, bool]) -> str:
    """``text`` with every ``@name@`` replaced and every conditional line kept or dropped.

    ``#@flag`` keeps a line where the flag is true, ``#@!flag`` where it is false. Raises KeyError
    for a name or flag that does not exist: a fault of the template.
    """
    lines = []
    for line in text.split("\n"):
        while condition := _CONDITION.search(line):
            negated, flag = condition.groups()
            if flags[flag] is bool(negated):
                break
            line = line[: condition.start()]
        else:
            lines.append(_NAME.sub(lambda match: values[match.group(1)], line))
    return "\n".join(lines)


def _templates() -> Iterator[tuple[str, str]]:
    """Path relative to the templates' folder, and text."""
    package = importlib.resources.files("convbert_deploy.triton.deployment")
    root = pathlib.Path(str(package)) / "templates"
    for path in root.rglob("*"):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
