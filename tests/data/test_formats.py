"""The parsers return what was encoded, and refuse what is not the format they read."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from idl.data.formats import parse_cifar10, parse_idx, read_members


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)))
def test_parsing_an_idx_file_returns_what_was_encoded(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    np.testing.assert_array_equal(parse_idx(header + array.tobytes(), ndim=array.ndim), array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: b"", "header of 16 bytes; got 0"),
        (lambda good: good[:15], "header of 16 bytes; got 15"),
        (lambda good: b"\x1f\x8b" + good[2:], "magic number must be 00000803 .*; got 1f8b0803"),
        (lambda good: good[:2] + b"\x0d" + good[3:], "magic number .*; got 00000d03"),  # float entries
        (lambda good: good[:3] + b"\x01" + good[4:], "3 dimensions.*; got 00000801"),
        (lambda good: good[:-1], r"shape \(2, 3, 4\) has 40 bytes; got 39"),
        (lambda good: good + b"\x00", r"shape \(2, 3, 4\) has 40 bytes; got 41"),
        (lambda good: good[:4] + b"\xff" * 12 + good[16:], "got 40"),  # sizes whose product has 96 bits
    ],
)
def test_a_file_that_is_not_idx_is_refused(encode, change, message):
    good = encode.idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    with pytest.raises(ValueError, match=message):
        parse_idx(change(good), ndim=3)


@given(st.binary(max_size=64))
def test_any_bytes_are_parsed_or_refused_with_a_value_error(data):
    for parse in (lambda data: parse_idx(data, ndim=1), parse_cifar10):
        try:
            parsed = parse(data)
        except ValueError as error:
            assert str(error)
        else:
            parts = parsed if isinstance(parsed, tuple) else (parsed,)
            assert sum(np.asarray(part).size for part in parts) <= len(data)


def test_parsing_a_cifar10_batch_returns_what_was_encoded(encode):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, 7, dtype=np.uint8)
    got_images, got_labels = parse_cifar10(encode.cifar10(images, labels))
    np.testing.assert_array_equal(got_images, images)
    np.testing.assert_array_equal(got_labels, labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes"),
        (bytes(3072), "records of 3073 bytes; got 3072 bytes"),
        (bytes([10]) + bytes(3072), "labels of CIFAR-10 are 0 to 9; got 10"),
    ],
)
def test_a_file_that_is_not_a_cifar10_batch_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_cifar10(data)


def test_members_come_in_the_order_asked_for(encode):
    archive = encode.tar_gz({"folder/a": b"first", "folder/b": b"second"})
    assert read_members(archive, ["folder/b", "folder/a"]) == [b"second", b"first"]


def test_a_missing_member_is_named(encode):
    with pytest.raises(ValueError, match=r"no file 'b'; it has \['a'\]"):
        read_members(encode.tar_gz({"a": b""}), ["b"])
