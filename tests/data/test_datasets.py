"""Each data set has its shapes, range, classes and split; loading needs what it says and nothing else."""

import gzip
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from idl import data
from idl.data import datasets
from idl.data.files import Fingerprint

MNIST_FILES = {
    "train-images-idx3-ubyte.gz": (20, 28, 28),
    "train-labels-idx1-ubyte.gz": (20,),
    "t10k-images-idx3-ubyte.gz": (10, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10,),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without data; the packages of this machine are left in place."""
    monkeypatch.setenv("IDL_DATA_HOME", str(tmp_path))
    return tmp_path


def serve(monkeypatch, server, source_name: str, files: dict[str, bytes]) -> None:
    """Let a data set consist of ``files``, on the server of the tests only."""
    server.files.update(files)
    source = replace(
        getattr(datasets, source_name),
        url=server.url,
        files={name: (Fingerprint.of(content, "md5"),) for name, content in files.items()},
        package_folder=None,
    )
    monkeypatch.setattr(datasets, source_name, source)


def check(dataset: data.Dataset, shape: tuple[int, ...], counts: tuple[int, int]) -> None:
    for images, labels, count in (
        (dataset.train_images, dataset.train_labels, counts[0]),
        (dataset.test_images, dataset.test_labels, counts[1]),
    ):
        assert images.dtype == torch.float32
        assert images.shape == (count, *shape)
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.dtype == torch.int64
        assert labels.shape == (count,)
        assert labels.min() >= 0
        assert labels.max() < len(dataset.classes)


def test_digits_have_a_fixed_split_of_all_images():
    dataset = data.load("digits")
    check(dataset, (1, 8, 8), (1437, 360))
    assert dataset.train_images.max() == 1
    assert dataset.classes == tuple("0123456789")
    # Fixed: whoever changes these numbers changes every published accuracy.
    assert dataset.test_labels[:10].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1]
    assert torch.equal(data.digits().train_images, dataset.train_images)


def test_digits_do_not_touch_the_random_state_of_the_user():
    np.random.seed(0)  # noqa: NPY002 - it is the global state that is looked at
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    data.digits()
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002


@pytest.mark.parametrize(("name", "source_name"), [("mnist", "MNIST"), ("fashion-mnist", "FASHION_MNIST")])
def test_the_mnists_are_what_their_files_say(monkeypatch, server, encode, name, source_name):
    rng = np.random.default_rng(0)
    arrays = {file: rng.integers(0, 10, shape, dtype=np.uint8) for file, shape in MNIST_FILES.items()}
    arrays["train-images-idx3-ubyte.gz"][0, 0, :2] = 0, 255
    serve(monkeypatch, server, source_name, {file: gzip.compress(encode.idx(a)) for file, a in arrays.items()})

    dataset = data.load(name)
    check(dataset, (1, 28, 28), (20, 10))
    assert dataset.name == name
    assert len(dataset.classes) == 10
    assert dataset.train_images[0, 0, 0, :2].tolist() == [0, 1]
    for field, file in zip(("train_images", "train_labels", "test_images", "test_labels"), MNIST_FILES, strict=True):
        scale = 255 if "images" in field else 1
        got = (getattr(dataset, field).squeeze(1) if scale == 255 else getattr(dataset, field)) * scale
        np.testing.assert_allclose(got.numpy(), arrays[file], rtol=1e-6)
    assert data.load(name, download=False).train_labels.tolist() == dataset.train_labels.tolist()
    assert len(server.requests) == 4


def test_cifar10_is_what_its_archive_says(monkeypatch, server, encode):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, 4), dtype=np.uint8)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    members = {f"cifar-10-batches-bin/{name}": encode.cifar10(images[i], labels[i]) for i, name in enumerate(names)}
    members["cifar-10-batches-bin/readme.html"] = b"not read"
    serve(monkeypatch, server, "CIFAR10", {"cifar-10-binary.tar.gz": encode.tar_gz(members)})

    dataset = data.load("cifar10")
    check(dataset, (3, 32, 32), (20, 4))
    assert dataset.classes[3] == "cat"
    assert dataset.train_labels.tolist() == labels[:5].ravel().tolist()
    assert dataset.test_labels.tolist() == labels[5].tolist()
    np.testing.assert_allclose(dataset.train_images.numpy() * 255, images[:5].reshape(20, 3, 32, 32), rtol=1e-6)
    np.testing.assert_allclose(dataset.test_images.numpy() * 255, images[5], rtol=1e-6)


@pytest.mark.skipif(
    not datasets.FASHION_MNIST.package_folder.is_dir(), reason="needs: apt-get install dataset-fashion-mnist"
)
def test_fashion_mnist_of_the_package_is_the_official_data_set():
    dataset = data.load("fashion-mnist", download=False)
    check(dataset, (1, 28, 28), (60000, 10000))
    assert dataset.train_images.max() == 1
    assert torch.bincount(dataset.train_labels).tolist() == [6000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10
    assert dataset.classes[int(dataset.train_labels[0])] == "Ankle boot"
    # The mean and deviation of the training pixels that are used everywhere to normalise them.
    assert dataset.train_images.mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert dataset.train_images.std().item() == pytest.approx(0.3530, abs=1e-4)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of 'digits', 'fashion-mnist', 'mnist', 'cifar10'; got 'cifar100'"):
        data.load("cifar100")


def test_a_dataset_is_frozen_and_has_a_short_repr():
    dataset = data.digits()
    assert repr(dataset) == "Dataset('digits', train=(1437, 1, 8, 8), test=(360, 1, 8, 8), classes=10)"
    with pytest.raises(FrozenInstanceError):
        dataset.name = "other"


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"implicit-deep-learning\[demo\]"):
        data.digits()


def test_importing_the_room_imports_no_extra():
    code = (
        "import sys, torch; before = set(sys.modules); "  # torch itself imports tqdm where it is installed
        "import idl.data; "
        "extras = {'sklearn', 'pooch', 'requests', 'rich', 'typer', 'matplotlib', 'scipy', 'tqdm'}; "
        "print(sorted(extras & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
