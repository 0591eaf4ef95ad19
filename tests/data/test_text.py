import inspect
from dataclasses import replace

import pytest
import torch

import idl.data
from idl.data import DatasetError
from idl.data.files import Fingerprint, read
from idl.data.text import TINYSHAKESPEARE


def test_the_help_texts_of_python_are_a_text():
    text = idl.data.topics()
    assert 300_000 < len(text) < 2_000_000
    assert "assert" in text
    assert text == idl.data.topics()


def test_windows_follow_one_another_and_targets_are_the_next_characters():
    text = "the quick brown fox jumps over the lazy dog " * 20
    windows = idl.data.character_windows(text, 16)
    assert windows.alphabet == "".join(sorted(set(text)))
    assert windows.decoded(windows.train_inputs.flatten()[:40]) == text[:40]
    assert windows.decoded(windows.train_targets.flatten()[:40]) == text[1:41]
    assert torch.equal(windows.encoded("fox"), torch.tensor([windows.alphabet.index(c) for c in "fox"]))
    split = len(text) - round(0.1 * len(text))
    assert windows.decoded(windows.test_inputs[0]) == text[split : split + 16]
    assert windows.train_inputs.numel() < split  # no target of a training window is a character for testing
    last = windows.decoded(windows.train_targets[-1])
    assert text[:split].rfind(last) + 16 <= split


def test_bytes_are_no_text():
    with pytest.raises(TypeError, match=r"`text` must be an instance of str.*text\.decode\(\)"):
        inspect.unwrap(idl.data.character_windows)(b"abc" * 100, 4)


@pytest.mark.parametrize(
    ("integers", "words"),
    [
        (torch.tensor([[0, 1]]), r"one dimension; got torch\.int64 \(1, 2\)\. Decode one text of a batch"),
        (torch.tensor([0.0]), r"a tensor of integers"),
        (torch.tensor([0, -1]), r"`integers` must lie in 0\.\.2, places in the alphabet; got -1"),
        (torch.tensor([3]), r"got 3"),
    ],
)
def test_what_is_no_text_is_not_decoded(integers, words):
    windows = idl.data.character_windows("abc" * 100, 4)
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(type(windows).decoded)(windows, integers)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="more than 16 characters"):
        idl.data.character_windows("a short text, and no more", 16)
    with pytest.raises(ValueError, match="`length`"):
        idl.data.character_windows("abc" * 100, 0)
    with pytest.raises(ValueError, match="`test_fraction`"):
        idl.data.character_windows("abc" * 100, 4, 1.0)
    with pytest.raises(ValueError, match=r"\['x'\]"):
        idl.data.character_windows("abc" * 100, 4).encoded("axb")


def test_shakespeare_is_found_as_a_file_of_the_home_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("IDL_DATA_HOME", str(tmp_path))
    with pytest.raises(DatasetError) as caught:
        idl.data.tinyshakespeare(download=False)
    assert "tinyshakespeare.txt" in str(caught.value)
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be")
    with pytest.raises(DatasetError, match="damaged"):
        idl.data.tinyshakespeare(download=False)


def test_a_download_has_another_name_on_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("IDL_DATA_HOME", str(tmp_path))
    server.files["input.txt"] = b"Friends, Romans"
    files = {"tinyshakespeare.txt": (Fingerprint.of(b"Friends, Romans", "sha256"),)}
    source = replace(TINYSHAKESPEARE, url=server.url, files=files)
    assert read(source, "tinyshakespeare.txt", progress=False) == b"Friends, Romans"
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == b"Friends, Romans"
