"""Images by name (handwritten digits, FashionMNIST, MNIST, CIFAR-10), time series and tasks on sequences.

Nothing here knows of models. Importing this room imports neither scikit-learn nor pooch; loading may.
"""

from idl.data.datasets import NAMES, Dataset, cifar10, digits, fashion_mnist, load, mnist
from idl.data.files import DatasetError
from idl.data.series import Windows, rolling_argmax, rolling_average, sliding_windows, spiky, sunspots

__all__ = [
    "NAMES",
    "Dataset",
    "DatasetError",
    "Windows",
    "cifar10",
    "digits",
    "fashion_mnist",
    "load",
    "mnist",
    "rolling_argmax",
    "rolling_average",
    "sliding_windows",
    "spiky",
    "sunspots",
]
