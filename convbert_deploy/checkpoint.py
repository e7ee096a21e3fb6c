"""A trained ConvBERT on disk: weights, architecture, labels and tokenizer.

The eager float32 model of a checkpoint, at the same padded shape, is the truth for every
comparison in this package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

from convbert_deploy.architecture import (
    Architecture,
    Task,
    architecture_from_shapes,
    num_labels_from_shapes,
    task_from_shapes,
)
from convbert_deploy.errors import CheckpointError, MissingDependencyError
from convbert_deploy.provenance import Origin
from convbert_deploy.weights import read_tensors

if TYPE_CHECKING:
    import torch
    import transformers

_CONFIG_FREE = ("hidden_act", "layer_norm_eps", "pad_token_id")
_CONFIG_CHECKED = (
    "vocab_size",
    "embedding_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_groups",
    "conv_kernel_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_MODEL_TYPES = ("convbert", "conv_bert")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)
_HEADS = ("classifier.", "qa_outputs.", "generator_", "sequence_summary.", "discriminator_")


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """What to believe instead of what is found. None means: look.

    config: config.json to read activation, epsilon, pad id and labels from.
    tokenizer: tokenizer.json, vocab.txt, or a folder with either.
    task: the head to use, for checkpoints whose tensors leave it open.
    """

    config: pathlib.Path | None = None
    tokenizer: pathlib.Path | None = None
    task: Task | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights under canonical names with all that is known of the model.

    ``tensors`` are as stored (any float dtype); ``eager_model`` computes in float32.
    ``dropped`` names head tensors that the chosen task does not use.
    """

    path: pathlib.Path
    tensors: dict[str, torch.Tensor]
    architecture: Architecture
    task: Task
    labels: tuple[str, ...]
    problem_type: str | None
    head_config: dict[str, Any]
    tokenizer_files: tuple[pathlib.Path, ...]
    config_path: pathlib.Path | None
    dropped: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | pathlib.Path, options: CheckpointOptions | None = None) -> Checkpoint:
        """Read a checkpoint file or Hugging Face directory.

        Raises:
            CheckpointError: unreadable, not a ConvBERT, even kernel, or config and weights differ.
        """
        options = options or CheckpointOptions()
        path = pathlib.Path(path)
        tensors = read_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        config_path = options.config or _neighbour(path, "config.json")
        config = _read_config(config_path) if config_path else {}
        architecture = _with_config(architecture_from_shapes(shapes), config, config_path)
        task = options.task or task_from_shapes(shapes)
        kept, dropped = _for_task(tensors, task, explicit=options.task is not None)
        count = num_labels_from_shapes(task, shapes)
        return cls(
            path=path,
            tensors=kept,
            architecture=architecture,
            task=task,
            labels=_labels(config, count),
            problem_type=config.get("problem_type"),
            head_config={k: v for k, v in config.items() if k.startswith("summary_")},
            tokenizer_files=tokenizer_files(options.tokenizer)
            if options.tokenizer
            else _tokenizer_in(path if path.is_dir() else path.parent),
            config_path=config_path,
            dropped=dropped,
        )

    def digest(self) -> str:
        """sha256 over architecture, task and every tensor (name, dtype, shape, bytes).

        The same weights have the same digest in a .pt and in a .safetensors file.
        """
        import torch

        sha = hashlib.sha256()
        head = {"architecture": self.architecture.to_json(), "task": self.task.value}
        sha.update(json.dumps(head | self.head_config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().contiguous()
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return sha.hexdigest()

    def origin(self) -> Origin:
        return Origin("checkpoint", self.path.name, self.digest())

    def eager_model(self) -> transformers.PreTrainedModel:
        """transformers' own model in float32, evaluation mode: the reference.

        Raises:
            CheckpointError: missing, extra or mis-shaped tensors, or weights that are not finite.
        """
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                "transformers", needed_for="the eager reference model", extra="export"
            ) from error
        model = _model_class(self.task)(self._transformers_config(transformers)).eval()
        state = {name: tensor.float() for name, tensor in self.tensors.items()}
        if self.task is Task.ENCODER:
            state = {name.removeprefix("convbert."): tensor for name, tensor in state.items()}
        elif self.task is Task.MASKED_LM:
            state.setdefault(
                "generator_lm_head.weight", state["convbert.embeddings.word_embeddings.weight"]
            )
        _check_state(state, {k: tuple(v.shape) for k, v in model.state_dict().items()}, self.path)
        model.load_state_dict(state)
        return model

    def _transformers_config(self, transformers: Any) -> Any:
        sizes = dict(self.architecture.to_json().items())
        labels = {}
        if self.labels:
            labels["id2label"] = dict(enumerate(self.labels))
            labels["label2id"] = {label: index for index, label in enumerate(self.labels)}
        return transformers.ConvBertConfig(
            **sizes, **labels, **self.head_config, problem_type=self.problem_type
        )


def _model_class(task: Task) -> Any:
    import transformers

    return {
        Task.ENCODER: transformers.ConvBertModel,
        Task.MASKED_LM: transformers.ConvBertForMaskedLM,
        Task.SEQUENCE_CLASSIFICATION: transformers.ConvBertForSequenceClassification,
        Task.TOKEN_CLASSIFICATION: transformers.ConvBertForTokenClassification,
        Task.QUESTION_ANSWERING: transformers.ConvBertForQuestionAnswering,
        Task.MULTIPLE_CHOICE: transformers.ConvBertForMultipleChoice,
    }[task]


def _check_state(
    state: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], path: pathlib.Path
) -> None:
    missing = sorted(set(expected) - set(state))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    extra = sorted(set(state) - set(expected))
    if extra:
        raise CheckpointError(
            f"{path} has {len(extra)} tensors this model does not: {', '.join(extra[:5])}",
            hint="--task TASK states which head to use; heads that are not its own are then dropped",
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"tensor {name} of {path} holds NaN or infinity")


def _for_task(
    tensors: dict[str, torch.Tensor], task: Task, *, explicit: bool
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Tensors of the encoder and of the task's head; other heads go only when the task was stated."""
    if not explicit:
        return tensors, ()
    own = {
        Task.ENCODER: (),
        Task.MASKED_LM: ("generator_",),
        Task.QUESTION_ANSWERING: ("qa_outputs.",),
        Task.MULTIPLE_CHOICE: ("classifier.", "sequence_summary."),
    }.get(task, ("classifier.",))
    dropped = tuple(n for n in sorted(tensors) if n.startswith(_HEADS) and not n.startswith(own))
    return {n: t for n, t in tensors.items() if n not in dropped}, dropped


def _neighbour(path: pathlib.Path, name: str) -> pathlib.Path | None:
    """``name`` inside a checkpoint directory or beside a checkpoint file."""
    candidate = (path if path.is_dir() else path.parent) / name
    return candidate if candidate.is_file() else None


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"config {path} is unreadable: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config {path} holds a {type(config).__name__}, expected an object")
    model_type = config.get("model_type", "convbert")
    if model_type not in _MODEL_TYPES:
        raise CheckpointError(
            f"config {path} says model_type {model_type!r}, expected {' or '.join(_MODEL_TYPES)}",
            hint="--config FILE names another config; without one the sizes are read off the tensors",
        )
    return config


def _with_config(
    seen: Architecture, config: dict[str, Any], path: pathlib.Path | None
) -> Architecture:
    for field in _CONFIG_CHECKED:
        if field in config and config[field] != getattr(seen, field):
            raise CheckpointError(
                f"config {path} says {field} {config[field]}, the tensors say {getattr(seen, field)}"
            )
    changes = {f: config[f] for f in _CONFIG_FREE if config.get(f) is not None}
    if "num_attention_heads" in config:
        changes |= {
            "num_attention_heads": config["num_attention_heads"],
            "head_ratio": config.get("head_ratio", 2),
        }
    architecture = dataclasses.replace(seen, **changes)
    if architecture.heads != seen.heads:
        raise CheckpointError(
            f"config {path} says {architecture.num_attention_heads} heads with head_ratio "
            f"{architecture.head_ratio}, so {architecture.heads} convolution heads; the tensors "
            f"have {seen.heads}"
        )
    return architecture


def _labels(config: dict[str, Any], count: int | None) -> tuple[str, ...]:
    if count is None:
        return ()
    named = config.get("id2label") or {}
    if named and len(named) != count:
        raise CheckpointError(f"config names {len(named)} labels, the classifier has {count} rows")
    return tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(count))


def tokenizer_files(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The tokenizer in a folder, or the file itself.

    Raises:
        CheckpointError: neither tokenizer.json nor vocab.txt.
    """
    if path.is_file() and path.name in _TOKENIZER_FILES:
        return (path,)
    files = _tokenizer_in(path)
    if not files:
        raise CheckpointError(f"no tokenizer in {path}: expected tokenizer.json or vocab.txt")
    return files


def _tokenizer_in(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    files = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    usable = {file.name for file in files} & {"tokenizer.json", "vocab.txt"}
    return files if usable else ()
