"""Data sets by name: handwritten digits, FashionMNIST, MNIST and CIFAR-10.

Nothing here knows of models. Importing this room imports neither scikit-learn nor pooch; loading may.
"""

from idl.data.datasets import NAMES, Dataset, cifar10, digits, fashion_mnist, load, mnist
from idl.data.files import DatasetError

__all__ = ["NAMES", "Dataset", "DatasetError", "cifar10", "digits", "fashion_mnist", "load", "mnist"]
