"""Images by name (handwritten digits, FashionMNIST, MNIST, CIFAR-10), time series, tasks on sequences, and texts.

Nothing here knows of models. Importing this room imports neither scikit-learn nor pooch; loading may.
"""

from idl.data.datasets import NAMES, Dataset, cifar10, digits, fashion_mnist, load, mnist
from idl.data.files import DatasetError
from idl.data.series import Windows, rolling_argmax, rolling_average, sliding_windows, spiky, sunspots
from idl.data.text import CharacterWindows, character_windows, tinyshakespeare, topics

__all__ = [
    "NAMES",
    "CharacterWindows",
    "Dataset",
    "DatasetError",
    "Windows",
    "character_windows",
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
    "tinyshakespeare",
    "topics",
]
