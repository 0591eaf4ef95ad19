"""Texts, and windows of their characters for models that predict the next one."""

from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from idl import checks
from idl.data.files import Fingerprint, Source, read

TINYSHAKESPEARE = Source(
    name="tinyshakespeare",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    files={
        "tinyshakespeare.txt": (
            Fingerprint("sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1115394),
        )
    },
    folder="",
    on_server={"tinyshakespeare.txt": "input.txt"},
)


def topics() -> str:
    """Return the help texts of this Python, about half a million characters; another Python has other ones.

    Example:
        >>> "lambda" in topics()
        True
    """
    from pydoc_data.topics import topics as by_name  # half a megabyte, which nothing else needs

    return "\n\n".join(by_name[name] for name in sorted(by_name))


def tinyshakespeare(*, download: bool = True, progress: bool = True) -> str:
    """Return a million characters of Shakespeare's plays, as Karpathy's char-rnn has collected them.

    Args:
        download: Whether to download them if they are neither ``$IDL_DATA_HOME/tinyshakespeare.txt`` nor in the cache.
        progress: Whether to show a progress bar while downloading, if standard error is a terminal.

    Raises:
        DatasetError: If the file is nowhere, cannot be read or downloaded, or has a wrong hash.
        ImportError: If a package of the extra ``demo`` is needed and missing.

    Returns:
        The text, 1,115,394 characters.

    Example:
        >>> print(tinyshakespeare()[:14])  # doctest: +SKIP
        First Citizen:
    """
    return read(TINYSHAKESPEARE, "tinyshakespeare.txt", download=download, progress=progress).decode()


class CharacterWindows(NamedTuple):
    """Windows of a text as integers, and for each place the character that comes next.

    Attributes:
        alphabet: All characters of the text, in order; integers are places in it.
        train_inputs: ``(windows, length)``.
        train_targets: Next characters, ``(windows, length)``.
        test_inputs: The same of the end of the text, which no training window touches.
        test_targets: Next characters.

    Example:
        >>> windows = character_windows("to be or not to be " * 5, length=8, test_fraction=0.2)
        >>> windows.decoded(windows.train_inputs[0]), windows.decoded(windows.train_targets[0])
        ('to be or', 'o be or ')
    """

    alphabet: str
    train_inputs: Int64[Tensor, "train length"]
    train_targets: Int64[Tensor, "train length"]
    test_inputs: Int64[Tensor, "test length"]
    test_targets: Int64[Tensor, "test length"]

    def encoded(self, text: str) -> Int64[Tensor, " characters"]:
        """Return the integers of a text.

        Raises:
            TypeError, ValueError: If it is no text, or a character is not in the alphabet.
        """
        checks.instance("text", text, str, "Decode bytes first: text.decode().")
        return _encoded(self.alphabet, text)

    def decoded(self, integers: Int64[Tensor, " characters"]) -> str:
        """Return the text of integers.

        Raises:
            TypeError, ValueError: If they are not in one dimension, or no places in the alphabet.
        """
        checks.instance("integers", integers, Tensor, "Try torch.tensor(integers).")
        if integers.dim() != 1 or integers.is_floating_point():
            raise ValueError(
                f"`integers` must be a tensor of integers in one dimension; got {integers.dtype} "
                f"{tuple(integers.shape)}. Decode one text of a batch at a time: decoded(tokens[0])."
            )
        places = integers.tolist()
        if wrong := [place for place in places if not 0 <= place < len(self.alphabet)]:
            raise ValueError(
                f"`integers` must lie in 0..{len(self.alphabet) - 1}, places in the alphabet; got {wrong[0]}."
            )
        return "".join(self.alphabet[place] for place in places)


def character_windows(text: str, length: int, test_fraction: float = 0.1) -> CharacterWindows:
    """Cut a text into windows one after another; the end of it is for testing.

    Args:
        text: The text.
        length: Characters of a window.
        test_fraction: Part of the text to test on, in (0, 1).

    Raises:
        TypeError, ValueError: If an argument is out of range, or the text gives no window to train or to test on.

    Returns:
        The windows as integers.

    Example:
        >>> windows = character_windows("abcabcabcabc", length=2, test_fraction=0.4)
        >>> windows.alphabet, windows.train_inputs.shape, windows.test_inputs.shape
        ('abc', torch.Size([3, 2]), torch.Size([2, 2]))
    """
    checks.instance("text", text, str, "Decode bytes first: text.decode().")
    length = checks.positive_integer("length", length)
    test_fraction = checks.in_open_unit("test_fraction", test_fraction)
    alphabet = "".join(sorted(set(text)))
    split = len(text) - round(test_fraction * len(text))
    parts = text[:split], text[split:]
    if min(map(len, parts)) <= length:
        raise ValueError(
            f"`text` must have more than {length} characters to train on, and to test on; got {len(parts[0])} and "
            f"{len(parts[1])}."
        )
    windows = [_windows(_encoded(alphabet, part), length) for part in parts]
    return CharacterWindows(alphabet, *windows[0], *windows[1])


def _encoded(alphabet: str, text: str) -> Tensor:
    places = {character: place for place, character in enumerate(alphabet)}
    unknown = sorted(set(text) - places.keys())
    if unknown:
        raise ValueError(f"`text` must have characters of the alphabet only; got {unknown[:5]}.")
    return torch.tensor([places[character] for character in text], dtype=torch.int64)


def _windows(integers: Tensor, length: int) -> tuple[Tensor, Tensor]:
    count = (len(integers) - 1) // length
    inputs, targets = (integers[shift : shift + count * length].view(count, length) for shift in (0, 1))
    return inputs, targets.clone()
