import os

import pytest

from idl.atomic import write_bytes, write_json


def test_a_file_holds_exactly_what_was_written(tmp_path):
    write_bytes(tmp_path / "file", b"old")
    write_bytes(tmp_path / "file", b"new content")
    assert (tmp_path / "file").read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["file"]


def test_a_path_may_be_a_string(tmp_path):
    write_json(f"{tmp_path}/file", {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_missing_folder_is_refused_by_the_name_of_the_file_that_was_to_be_written(tmp_path, folder):
    write_bytes(tmp_path / "file", b"old")
    with pytest.raises(FileNotFoundError, match=f"`path` must lie in a folder that exists; got .*/{folder}/new. Make"):
        write_bytes(tmp_path / folder / "new", b"")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_json_has_no_form_for_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert (tmp_path / "file.json").read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_result_is_readable_for_whom_the_umask_says(tmp_path):
    mask = os.umask(0o022)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
