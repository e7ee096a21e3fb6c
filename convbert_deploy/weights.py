"""Reading tensors from disk, without ever running code from the file.

Accepted: ``.safetensors``; ``.pt``/``.pth``/``.bin`` state dicts, bare or wrapped the way Lightning,
Trainer and DataParallel write them; Hugging Face directories, sharded or not.
"""

from __future__ import annotations

import json
import pathlib
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convbert_deploy.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
_ANCHOR = "encoder.layer.0.attention.self.conv_kernel_layer.weight"
#: index buffers of older transformers versions; not weights
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_tensors(path: pathlib.Path) -> Tensors:
    """All weights of a checkpoint under canonical names (``convbert.`` prefix, no wrappers).

    Raises:
        CheckpointError: missing, unreadable, truncated, needs unpickling, or not a ConvBERT.
    """
    return canonical_names(read_raw_tensors(path), path)


def read_raw_tensors(path: pathlib.Path) -> Tensors:
    """All tensors under the names the file gives them, whatever model they belong to.

    Raises:
        CheckpointError: missing, unreadable, truncated, or needs unpickling.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    raw: Tensors = {}
    for file in weight_files(path):
        raw.update(_read_file(file))
    return raw


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights of a checkpoint file or Hugging Face directory."""
    if path.is_file():
        return [path]
    for name in _SINGLE:
        if (path / name).is_file():
            return [path / name]
    for name in _SINGLE:
        index = path / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    found = sorted(p.name for p in path.iterdir())
    raise CheckpointError(
        f"no weights in {path}: expected {' or '.join(_SINGLE)} or their .index.json, found "
        f"{', '.join(found) or 'nothing'}"
    )


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a shard index: no readable weight_map") from error
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise CheckpointError(f"{index} names shard {name!r}: expected a plain file name")
    shards = [index.parent / name for name in names]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CheckpointError(f"{index} names shards that are missing: {', '.join(absent)}")
    return shards


def _read_file(path: pathlib.Path) -> Tensors:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _read_torch(path)
    raise CheckpointError(
        f"{path} has suffix {path.suffix or '(none)'}: expected .safetensors, "
        f"{', '.join(_TORCH_SUFFIXES)} or a Hugging Face directory"
    )


def _read_safetensors(path: pathlib.Path) -> Tensors:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "safetensors", needed_for="reading a checkpoint", extra="export"
        ) from error
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is unreadable or truncated: {error}") from error


def _read_torch(path: pathlib.Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "torch", needed_for="reading a checkpoint", extra="export"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} needs code to be unpickled, or is no torch file; only plain tensors are loaded",
            hint="where you trust it, save the weights alone: "
            "torch.save(model.state_dict(), 'weights.pt')",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is unreadable or truncated: {first_line}") from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: pathlib.Path) -> Tensors:
    import torch

    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a state dict of named tensors"
        )
    strangers = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise CheckpointError(
            f"{path} holds entries that are not tensors: {', '.join(strangers[:5])}; expected a "
            f"state dict, or one under {', '.join(_WRAPPERS)}"
        )
    return {str(key): value for key, value in content.items()}


def canonical_names(tensors: Tensors, path: pathlib.Path) -> Tensors:
    """Strip wrapper prefixes (``module.``, ``model.``, ``_orig_mod.``...) down to ``convbert.``.

    Raises:
        CheckpointError: no ConvBERT convolution in the file, or two tensors meet under one name.
    """
    heads = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    if not heads:
        raise CheckpointError(
            f"{path} is not a ConvBERT: none of its {len(tensors)} tensors ends in {_ANCHOR}",
            hint="convbert-deploy inspect CHECKPOINT lists what the file holds",
        )
    if len(heads) > 1:
        raise CheckpointError(
            f"{path} holds {len(heads)} encoders, under {', '.join(map(repr, heads))}; expected one"
        )
    head = heads[0]
    bare = not head.endswith("convbert.")
    prefix = head if bare else head.removesuffix("convbert.")
    canonical: Tensors = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short.endswith(_BUFFERS):
            continue
        if bare and short.startswith(("embeddings.", "embeddings_project.", "encoder.")):
            short = f"convbert.{short}"
        if short in canonical:
            raise CheckpointError(f"{path} holds two tensors called {short}")
        canonical[short] = tensor
    return canonical
