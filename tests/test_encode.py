"""Shards: compiled code and plain Python write the same bytes, from which the voxels come back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.decode import decode_shard, decode_shard_slowly
from ingest.encode import COMPILED, encode_shard, encode_shard_slowly

ENCODERS = [encode_shard, encode_shard_slowly]


@pytest.mark.skipif(not COMPILED, reason="no compiled encoder here")
@settings(max_examples=150, deadline=None)
@given(
    slabs=st.integers(1, 5), planes=st.integers(1, 4), height=st.integers(1, 40), width=st.integers(1, 90),
    levels=st.integers(1, 256), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_both_encoders_write_the_same(slabs, planes, height, width, levels, seed):
    assert encode_shard is not encode_shard_slowly
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, levels, (slabs * planes, height, width)).astype(np.uint8)
    volume[rng.random(volume.shape) < 0.5] = 0
    content = encode_shard(volume, planes)
    assert content == encode_shard_slowly(volume, planes)
    for decode in (decode_shard, decode_shard_slowly):
        found = np.full_like(volume, 77)
        decode(np.frombuffer(content, np.uint8), planes, found)
        np.testing.assert_array_equal(found, volume)


@pytest.mark.parametrize("encode", ENCODERS)
def test_planes_that_make_no_whole_slabs_are_refused(encode):
    with pytest.raises(ValueError, match="6 planes cannot be cut into slabs of 4; choose a divisor of 6"):
        encode(np.zeros((6, 2, 2), np.uint8), 4)


@pytest.mark.skipif(not COMPILED, reason="no compiled encoder here")
def test_voxels_that_do_not_lie_in_order_are_put_in_order():
    volume = np.random.default_rng(0).integers(0, 9, (5, 6, 8)).astype(np.uint8)
    assert encode_shard(volume.T, 2) == encode_shard_slowly(np.ascontiguousarray(volume.T), 2)
