"""What the GPU runners share: buckets, padding, buffers, the bounded store of captured work."""

from __future__ import annotations

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.buckets import (
    Buckets,
    cut,
    length_profiles,
    output_shape,
    write_padded,
)
from convbert_deploy.backends.device_buffers import DeviceBuffers
from convbert_deploy.backends.graph_cache import GraphedCall, ShapeCache
from convbert_deploy.errors import InputError, ShapeError
from convbert_deploy.shapes import ShapeProfile

from fake_gpu import FakeDevice

PROFILE = ShapeProfile.parse("batch=1:8:32,seq=16:128:500")


def test_masked_buckets_come_from_the_profile() -> None:
    buckets = Buckets.of(PROFILE, "masked")
    assert buckets.batch == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert buckets.seq == (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 500)
    assert buckets.shape_for((5, 17)) == (6, 24)
    assert buckets.shape_for((32, 500)) == (32, 500)
    assert buckets.shape_for((1, 3)) == (1, 16)
    assert buckets.shape_for((5, 3, 17)) == (6, 3, 24), "choices stay as they are"


def test_at_most_a_third_is_padding() -> None:
    buckets = Buckets.of(ShapeProfile.parse("batch=1:8:128,seq=1:128:512"), "masked")
    for sizes in (buckets.batch, buckets.seq):
        for size in range(4, sizes[-1] + 1):
            up = next(bucket for bucket in sizes if bucket >= size)
            assert up - size <= up / 3


def test_hf_padding_is_never_added_to() -> None:
    """transformers' convolutions read pads: a padded batch has another answer."""
    assert Buckets.of(PROFILE, "hf").shape_for((5, 17)) == (5, 17)


def test_larger_than_every_bucket_is_refused() -> None:
    with pytest.raises(ShapeError, match="input has seq 501, the engine takes at most 500"):
        Buckets.of(PROFILE, "masked").shape_for((1, 501))


@pytest.mark.parametrize("between", [(), (3,)])
def test_padding_is_masked_and_added_rows_have_a_token(between) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(1, 99, (2, *between, 5))
    for name, last in (("input_ids", 0), ("attention_mask", 1)):
        target = np.full((4, *between, 8), 77)
        write_padded(target, name, ids)
        np.testing.assert_array_equal(target[:2, ..., :5], ids)
        assert not target[:2, ..., 5:].any() and not target[2:, ..., 1:].any()
        assert (target[2:, ..., 0] == last).all()


def test_cutting_gives_a_copy_of_what_was_asked() -> None:
    whole = np.arange(4 * 8 * 2, dtype=np.float32).reshape(4, 8, 2)
    tokens = cut(whole, (3, 5), Task.ENCODER)
    np.testing.assert_array_equal(tokens, whole[:3, :5])
    pooled = cut(whole[:, 0], (3, 5), Task.SEQUENCE_CLASSIFICATION)
    np.testing.assert_array_equal(pooled, whole[:3, 0])
    choices = cut(whole[..., 0], (3, 8, 5), Task.MULTIPLE_CHOICE)
    np.testing.assert_array_equal(choices, whole[:3, :, 0])
    expected = tokens.copy()
    whole[:] = -1
    np.testing.assert_array_equal(tokens, expected)


def test_length_profiles_cover_the_profile_without_gaps() -> None:
    parts = length_profiles(PROFILE)
    ranges = [(part.seq.min, part.seq.opt, part.seq.max) for part in parts]
    assert ranges == [(16, 64, 64), (65, 128, 128), (129, 256, 256), (257, 500, 500)]
    assert all(part.batch == PROFILE.batch for part in parts)
    fixed = ShapeProfile.parse("batch=8,seq=128")
    assert length_profiles(fixed) == (fixed,)
    tuned_for_40 = length_profiles(ShapeProfile.parse("seq=1:40:128"))[0]
    assert tuned_for_40.seq.opt == 40


def test_output_axes_are_numbers_or_names() -> None:
    assert output_shape(("batch", "seq", 7), (3, 5), Task.ENCODER) == (3, 5, 7)
    assert output_shape(("batch", "choices"), (3, 2, 5), Task.MULTIPLE_CHOICE) == (3, 2)
    with pytest.raises(ShapeError, match="axis 'unk__1', expected batch, seq"):
        output_shape(("batch", "unk__1"), (3, 5), Task.ENCODER)
    with pytest.raises(ShapeError, match="axis None"):
        output_shape(("batch", None), (3, 5), Task.ENCODER)


def test_the_store_drops_what_was_unused_longest_before_it_makes_more() -> None:
    alive: set[tuple[int, ...]] = set()
    most = []

    class Made:
        def __init__(self, shape) -> None:
            self.shape = shape
            alive.add(shape)
            most.append(len(alive))

        def __del__(self) -> None:
            alive.discard(self.shape)

    cache = ShapeCache(2, Made)
    for shape in [(1, 1), (2, 2), (1, 1), (3, 3), (1, 1)]:
        assert cache.get(shape).shape == shape
    assert alive == {(1, 1), (3, 3)} and (2, 2) not in cache
    assert most == [1, 2, 2], "made three times, never three at once"
    cache.clear()
    assert not alive and len(cache) == 0


def test_work_is_run_once_plainly_then_captured_then_replayed() -> None:
    device = FakeDevice()
    call = GraphedCall(device, lambda: device.log.append("work"), capture=True)
    assert not call.captured
    call()
    assert device.log == ["work", "wait", "capture"] and call.captured
    device.log.clear()
    call()
    assert device.log == ["replay", "work", "wait"]


def test_without_graphs_work_is_never_captured() -> None:
    device = FakeDevice()
    call = GraphedCall(device, lambda: device.log.append("work"), capture=False)
    call()
    call()
    assert device.log == ["work", "wait"] * 2 and call.refused is None


def test_refused_capture_falls_back_for_good() -> None:
    device = FakeDevice(refuses="operation not permitted when stream is capturing")
    call = GraphedCall(device, lambda: device.log.append("work"), capture=True)
    call()
    call()
    assert device.log == ["work", "wait", "capture", "work", "wait"]
    assert "not permitted" in call.refused and not call.captured


def test_buffers_move_a_padded_batch_and_keep_their_addresses() -> None:
    device = FakeDevice()
    names = ("input_ids", "attention_mask")
    buffers = DeviceBuffers(device, names, (4, 8), {"last_hidden_state": (4, 8, 2)})
    allocated = device.allocations
    addresses = [buffers.address(name) for name in (*names, "last_hidden_state")]
    ids = np.arange(1, 11).reshape(2, 5)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for _ in range(2):
        buffers.write(batch)
        with device.working():
            buffers.copy_in()
        moved = device.at(buffers.address("input_ids"))
        np.testing.assert_array_equal(moved[:2, :5], ids)
        device.at(buffers.address("last_hidden_state"))[:] = moved[..., None]
        with device.working():
            buffers.copy_out()
        answer = buffers.read(batch, Task.ENCODER)["last_hidden_state"]
        np.testing.assert_array_equal(answer, np.repeat(ids[..., None], 2, -1))
    assert device.allocations == allocated, "nothing is allocated after the first time"
    assert addresses == [buffers.address(name) for name in (*names, "last_hidden_state")]
    with pytest.raises(InputError, match="lacks attention_mask"):
        buffers.write({"input_ids": ids})
