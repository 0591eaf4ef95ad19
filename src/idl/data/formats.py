"""What the bytes of a data file mean: the IDX format of MNIST, the binary version of CIFAR-10.

Bytes in, numpy arrays out. Where the bytes come from is the business of `files.py`.
"""

import io
import math
import tarfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_IDX_UNSIGNED_BYTE = 0x08
_CIFAR_IMAGE = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_IMAGE)  # one label, then the red, green and blue plane, row by row
_CIFAR_CLASSES = 10


def parse_idx(data: bytes, *, ndim: int) -> Bytes:
    """Read an uncompressed IDX file of unsigned bytes.

    The file is a magic number (two zero bytes, the type of an entry, the number of dimensions), the sizes as
    big-endian 32-bit integers, then the entries in C order.

    Args:
        data: The whole file.
        ndim: Number of dimensions that the file has to have: 3 for images, 1 for labels.

    Returns:
        An array with ``ndim`` dimensions, read-only because it shares memory with ``data``.

    Raises:
        ValueError: If the magic number, the number of dimensions or the length is not as it should be.
    """
    header = 4 + 4 * ndim
    if len(data) < header:
        raise ValueError(f"an IDX file with {ndim} dimensions has a header of {header} bytes; got {len(data)}.")
    magic, expected = data[:4], bytes([0, 0, _IDX_UNSIGNED_BYTE, ndim])
    if magic != expected:
        raise ValueError(
            f"the magic number must be {expected.hex()} (IDX, unsigned bytes, {ndim} dimensions); got {magic.hex()}."
        )
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=ndim, offset=4))
    if len(data) != header + math.prod(shape):
        raise ValueError(f"an IDX file of shape {shape} has {header + math.prod(shape)} bytes; got {len(data)}.")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def parse_cifar10(data: bytes) -> tuple[Bytes, Bytes]:
    """Read one batch file of the binary version of CIFAR-10.

    Args:
        data: The whole file, records of 3073 bytes.

    Returns:
        Images of shape ``(N, 3, 32, 32)`` and labels of shape ``(N,)``, read-only.

    Raises:
        ValueError: If the length is not a positive multiple of 3073, or a label is not below 10.
    """
    if not data or len(data) % _CIFAR_RECORD:
        raise ValueError(
            f"a CIFAR-10 batch is a positive number of records of {_CIFAR_RECORD} bytes; got {len(data)} bytes."
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0]
    if labels.max() >= _CIFAR_CLASSES:
        raise ValueError(f"labels of CIFAR-10 are 0 to {_CIFAR_CLASSES - 1}; got {labels.max()}.")
    return records[:, 1:].reshape(-1, *_CIFAR_IMAGE), labels


def read_members(archive: bytes, members: Sequence[str]) -> list[bytes]:
    """Read some files out of a ``.tar.gz`` archive; nothing is extracted to disk.

    Args:
        archive: The whole archive.
        members: Names of regular files in it.

    Returns:
        Their contents, in the order of ``members``.

    Raises:
        ValueError: If a member is missing or is not a regular file.
    """
    contents = []
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in members:
            try:
                file = tar.extractfile(member)
            except KeyError:
                file = None
            if file is None:
                raise ValueError(f"the archive has no file {member!r}; it has {tar.getnames()}.")
            contents.append(file.read())
    return contents
