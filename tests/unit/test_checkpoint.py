"""Checkpoints as people really have them, and as they really break."""

from __future__ import annotations

import json
import pickle

import pytest
import safetensors.torch
import torch

from convbert_deploy.architecture import Task
from convbert_deploy.checkpoint import Checkpoint, CheckpointOptions
from convbert_deploy.errors import CheckpointError

import factories

TASKS = list(Task)


@pytest.fixture(scope="module")
def state():
    return factories.realistic_model("tiny").state_dict()


def _save(state, path):
    torch.save(state, path)
    return path


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_task_and_architecture_are_read_off_the_tensors(task, tmp_path):
    model = factories.realistic_model("tiny", task, num_groups=2)
    checkpoint = Checkpoint.load(_save(model.state_dict(), tmp_path / "m.pt"))
    assert checkpoint.task is task
    assert checkpoint.architecture == factories.architecture_of(model)
    restored = checkpoint.eager_model().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored[name], tensor), name


@pytest.mark.parametrize("shape", sorted(factories.ODD_SHAPES))
def test_odd_shapes_give_the_same_model(shape, tmp_path):
    model = factories.realistic_model(shape)
    eager = Checkpoint.load(_save(model.state_dict(), tmp_path / "m.pt")).eager_model()
    batch = factories.architecture_of(model)
    ids = torch.arange(2 * 9).reshape(2, 9) % batch.vocab_size
    with torch.no_grad():
        assert torch.equal(eager(input_ids=ids).logits, model(input_ids=ids).logits)


WRAPPINGS = {
    "bare": lambda s: s,
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "trainer": lambda s: {"model": s, "step": 10},
    "data-parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "nested": lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "old-buffers": lambda s: {**s, "convbert.embeddings.position_ids": torch.arange(128)[None]},
    "half": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("wrapping", sorted(WRAPPINGS))
def test_wrapped_state_dicts(wrapping, state, tmp_path):
    checkpoint = Checkpoint.load(_save(WRAPPINGS[wrapping](state), tmp_path / "m.pth"))
    assert set(checkpoint.tensors) == set(state)
    assert checkpoint.eager_model().dtype is torch.float32


def test_same_weights_same_digest_whatever_the_file(state, tmp_path):
    one = Checkpoint.load(_save(WRAPPINGS["lightning"](state), tmp_path / "m.bin"))
    safetensors.torch.save_file(dict(state), tmp_path / "m.safetensors")
    other = Checkpoint.load(tmp_path / "m.safetensors")
    assert one.digest() == other.digest()
    changed = dict(state) | {"classifier.dense.bias": state["classifier.dense.bias"] + 1e-6}
    assert Checkpoint.load(_save(changed, tmp_path / "c.pt")).digest() != one.digest()


def test_hugging_face_directory_sharded(tmp_path):
    model = factories.realistic_model("tiny", Task.MASKED_LM)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.task is Task.MASKED_LM
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(checkpoint.eager_model()(ids).logits, model(ids).logits)


def test_config_gives_what_tensors_cannot(tmp_path):
    model = factories.realistic_model("tiny", hidden_act="relu", layer_norm_eps=1e-6)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # older local copies say conv_bert, and return_dict false breaks transformers 5
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "conv_bert", "return_dict": False})
    )
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.architecture.hidden_act == "relu"
    assert checkpoint.architecture.layer_norm_eps == 1e-6
    assert checkpoint.labels == ("bad", "fair", "good")


def test_stated_task_drops_other_heads(state, tmp_path):
    path = _save(state, tmp_path / "m.pt")
    checkpoint = Checkpoint.load(path, CheckpointOptions(task=Task.ENCODER))
    assert checkpoint.task is Task.ENCODER
    assert "classifier.out_proj.weight" in checkpoint.dropped
    checkpoint.eager_model()


def _without(name):
    return lambda s: {k: v for k, v in s.items() if k != name}


def _with(name, tensor):
    return lambda s: dict(s) | {name: tensor}


QUERY = "convbert.encoder.layer.1.attention.self.query.weight"
DEPTHWISE = "convbert.encoder.layer.0.attention.self.key_conv_attn_layer.depthwise.weight"
FAULTS = {
    "missing tensor": (_without(QUERY), QUERY),
    "extra tensor": (_with("surprise.weight", torch.zeros(3)), "surprise.weight"),
    "mis-shaped tensor": (_with(QUERY, torch.zeros(5, 5)), r"\[5, 5\]"),
    "NaN weight": (_with(QUERY, torch.full((32, 64), torch.nan)), "NaN"),
    "even kernel": (_with(DEPTHWISE, torch.zeros(64, 1, 8)), "8 is even"),
    "missing layer": (
        lambda s: {k.replace("layer.1.", "layer.4."): v for k, v in s.items()},
        "layers .* missing",
    ),
    "not a ConvBERT": (lambda s: {"bert.embeddings.weight": torch.zeros(2, 2)}, "not a ConvBERT"),
    "not tensors": (lambda s: {"epoch": 3, "loss": 0.5}, "not tensors"),
    "empty": (lambda s: {}, "expected a state dict"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_unusable_weights_are_named(fault, state, tmp_path):
    damage, message = FAULTS[fault]
    path = _save(damage(state), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(path).eager_model()


class _Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save({"state_dict": _Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.load(tmp_path / name)
        assert "state_dict" in caught.value.hint
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(suffix, state, tmp_path):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(dict(state), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="unreadable|torch file"):
        Checkpoint.load(path)


def test_shard_index_cannot_leave_its_folder(tmp_path):
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="plain file name"):
        Checkpoint.load(tmp_path)


def test_config_that_contradicts_the_tensors(state, tmp_path):
    _save(state, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 768}))
    with pytest.raises(CheckpointError, match="hidden_size 768, the tensors say 64"):
        Checkpoint.load(tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="model_type 'bert'"):
        Checkpoint.load(tmp_path / "m.pt")
