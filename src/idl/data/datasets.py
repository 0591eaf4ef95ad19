"""The data sets: where each comes from, its classes, its split; tensors in [0, 1].

Paths and downloads are in `files.py`, file formats in `formats.py`.
"""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idl import checks
from idl.data import formats
from idl.data.files import Fingerprint, Source, read

# Debian's package holds the same compressed streams under a gzip header without name and date: the data are
# the originals, the hash of the file is another. Both are accepted: first the server's, then the package's.
# (With name and date put back, the package's files have the md5 sums that torchvision publishes.)
FASHION_MNIST = Source(
    name="fashion-mnist",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    files={
        "train-images-idx3-ubyte.gz": (
            Fingerprint("sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26421880),
            Fingerprint("sha256:b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7", 26421856),
        ),
        "train-labels-idx1-ubyte.gz": (
            Fingerprint("sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29515),
            Fingerprint("sha256:0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056", 29491),
        ),
        "t10k-images-idx3-ubyte.gz": (
            Fingerprint("sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4422102),
            Fingerprint("sha256:cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa", 4422079),
        ),
        "t10k-labels-idx1-ubyte.gz": (
            Fingerprint("sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5148),
            Fingerprint("sha256:8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05", 5125),
        ),
    },
    package_folder=Path("/usr/share/datasets/fashion-mnist"),
    package="dataset-fashion-mnist",
)

# The md5 sums are those of torchvision's datasets/mnist.py.
MNIST = Source(
    name="mnist",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    files={
        "train-images-idx3-ubyte.gz": (Fingerprint("md5:f68b3c2dcbeaaa9fbdd348bbdeb94873", 9912422),),
        "train-labels-idx1-ubyte.gz": (Fingerprint("md5:d53e105ee54ea40749a09fcbcd1e9432", 28881),),
        "t10k-images-idx3-ubyte.gz": (Fingerprint("md5:9fb629c4189551a2d022fa330f9573f3", 1648877),),
        "t10k-labels-idx1-ubyte.gz": (Fingerprint("md5:ec29112dd5afa0611ce80d1b7f02629c", 4542),),
    },
)

# The binary version, not the pickles for Python: unpickling a file runs whatever it says. The md5 sum is that
# of the page https://www.cs.toronto.edu/~kriz/cifar.html.
CIFAR10 = Source(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/",
    files={"cifar-10-binary.tar.gz": (Fingerprint("md5:c32a1d4ab5d03f1284b67883e8d87530", 170052171),)},
)

_DIGIT_CLASSES = tuple("0123456789")
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels, split into a training and a test set.

    Attributes:
        name: One of :data:`NAMES`.
        train_images: Images in [0, 1].
        train_labels: For each image, an index into ``classes``.
        test_images: Images in [0, 1].
        test_labels: For each image, an index into ``classes``.
        classes: Names of the classes.

    Example:
        >>> digits().train_images.shape
        torch.Size([1437, 1, 8, 8])
    """

    name: str
    train_images: Float[Tensor, "train channels height width"]
    train_labels: Int64[Tensor, " train"]
    test_images: Float[Tensor, "test channels height width"]
    test_labels: Int64[Tensor, " test"]
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        train, test = tuple(self.train_images.shape), tuple(self.test_images.shape)
        return f"Dataset({self.name!r}, train={train}, test={test}, classes={len(self.classes)})"


def digits() -> Dataset:
    """Load the 1797 handwritten digits, 8 x 8 pixels, that scikit-learn ships. Needs no network.

    They have no official split. Ours is fixed: ``numpy.random.RandomState(0)``, whose stream NumPy promises
    never to change, permutes the images; the first 1437 (80 %) are for training, the other 360 for the test.
    Writers are thus mixed, and accuracies are higher than on a split by writer.

    Returns:
        Grey images of shape ``(N, 1, 8, 8)`` with values ``k / 16``.

    Raises:
        ImportError: If scikit-learn is missing.

    Example:
        >>> digits()
        Dataset('digits', train=(1437, 1, 8, 8), test=(360, 1, 8, 8), classes=10)
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the digits come with scikit-learn, and {error.name} is missing.\n"
            "    Install the extra: pip install 'implicit-deep-learning[demo]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = np.split(order, [len(order) * 4 // 5])
    images = (pixels / 16).reshape(-1, 1, 8, 8)
    return Dataset(
        name="digits",
        train_images=_images(images[train]),
        train_labels=_labels(labels[train]),
        test_images=_images(images[test]),
        test_labels=_labels(labels[test]),
        classes=_DIGIT_CLASSES,
    )


def fashion_mnist(*, download: bool = True, progress: bool = True) -> Dataset:
    """Load FashionMNIST: 60000 and 10000 images of clothes, 28 x 28 pixels.

    Args:
        download: Whether to use the network if the files are not on this machine.
        progress: Whether to show a progress bar while downloading.

    Returns:
        Grey images of shape ``(N, 1, 28, 28)`` with the official split.

    Raises:
        DatasetError: If a file is nowhere, cannot be downloaded or is damaged.
        ImportError: If a download needs a package that is missing.

    Example:
        >>> fashion_mnist()  # doctest: +SKIP
        Dataset('fashion-mnist', train=(60000, 1, 28, 28), test=(10000, 1, 28, 28), classes=10)
    """
    return _idx_dataset(FASHION_MNIST, _FASHION_CLASSES, download=download, progress=progress)


def mnist(*, download: bool = True, progress: bool = True) -> Dataset:
    """Load MNIST: 60000 and 10000 handwritten digits, 28 x 28 pixels.

    Args:
        download: Whether to use the network if the files are not on this machine.
        progress: Whether to show a progress bar while downloading.

    Returns:
        Grey images of shape ``(N, 1, 28, 28)`` with the official split.

    Raises:
        DatasetError: If a file is nowhere, cannot be downloaded or is damaged.
        ImportError: If a download needs a package that is missing.

    Example:
        >>> mnist()  # doctest: +SKIP
        Dataset('mnist', train=(60000, 1, 28, 28), test=(10000, 1, 28, 28), classes=10)
    """
    return _idx_dataset(MNIST, _DIGIT_CLASSES, download=download, progress=progress)


def cifar10(*, download: bool = True, progress: bool = True) -> Dataset:
    """Load CIFAR-10: 50000 and 10000 colour photographs, 32 x 32 pixels.

    Args:
        download: Whether to use the network if the file is not on this machine.
        progress: Whether to show a progress bar while downloading.

    Returns:
        Images of shape ``(N, 3, 32, 32)``, channels red, green and blue, with the official split.

    Raises:
        DatasetError: If the file is nowhere, cannot be downloaded or is damaged.
        ImportError: If a download needs a package that is missing.

    Example:
        >>> cifar10()  # doctest: +SKIP
        Dataset('cifar10', train=(50000, 3, 32, 32), test=(10000, 3, 32, 32), classes=10)
    """
    archive = read(CIFAR10, "cifar-10-binary.tar.gz", download=download, progress=progress)
    members = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    contents = formats.read_members(archive, [f"cifar-10-batches-bin/{member}" for member in members])
    *train, test = map(formats.parse_cifar10, contents)
    return Dataset(
        name=CIFAR10.name,
        train_images=_images(np.concatenate([images for images, _ in train])),
        train_labels=_labels(np.concatenate([labels for _, labels in train])),
        test_images=_images(test[0]),
        test_labels=_labels(test[1]),
        classes=_CIFAR10_CLASSES,
    )


_LOADERS: dict[str, Callable[..., Dataset]] = {
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
}

NAMES = ("digits", *_LOADERS)
"""The names that :func:`load` knows."""


def load(name: str, *, download: bool = True, progress: bool = True) -> Dataset:
    """Load a data set by its name.

    Files are looked for in ``$IDL_DATA_HOME/<name>``, then (FashionMNIST) in the folder of Debian's package
    ``dataset-fashion-mnist``, then in the user's cache, and are downloaded otherwise. Each is checked by its
    hash before it is used.

    Args:
        name: One of :data:`NAMES`: ``"digits"``, ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``.
        download: Whether to use the network if the files are not on this machine.
        progress: Whether to show a progress bar while downloading.

    Returns:
        Images, labels and names of classes.

    Raises:
        ValueError: If there is no data set of this name.
        DatasetError: If a file is nowhere, cannot be downloaded or is damaged.
        ImportError: If a package of the extra ``demo`` is needed and missing.

    Example:
        >>> load("digits")
        Dataset('digits', train=(1437, 1, 8, 8), test=(360, 1, 8, 8), classes=10)
    """
    checks.one_of("name", name, NAMES)
    if name == "digits":
        return digits()
    return _LOADERS[name](download=download, progress=progress)


def _idx_dataset(source: Source, classes: tuple[str, ...], *, download: bool, progress: bool) -> Dataset:
    """Load the four files that MNIST and its successors consist of."""

    def parse(file: str, ndim: int) -> formats.Bytes:
        data = read(source, file, download=download, progress=progress)
        return formats.parse_idx(gzip.decompress(data), ndim=ndim)

    return Dataset(
        name=source.name,
        train_images=_images(parse("train-images-idx3-ubyte.gz", 3)[:, np.newaxis]),
        train_labels=_labels(parse("train-labels-idx1-ubyte.gz", 1)),
        test_images=_images(parse("t10k-images-idx3-ubyte.gz", 3)[:, np.newaxis]),
        test_labels=_labels(parse("t10k-labels-idx1-ubyte.gz", 1)),
        classes=classes,
    )


def _images(
    array: npt.NDArray[np.uint8] | npt.NDArray[np.float64],
) -> Float[Tensor, "batch channels height width"]:
    """Copy to float32; bytes are scaled to [0, 1]."""
    images = torch.from_numpy(array.astype(np.float32))
    return images.div_(255) if array.dtype == np.uint8 else images


def _labels(array: npt.NDArray[np.integer]) -> Int64[Tensor, " batch"]:
    return torch.from_numpy(array.astype(np.int64))
