"""Files are found in the order promised, never used without a check, and never left half-written."""

import logging
import sys
import traceback
from pathlib import Path

import pytest

from idl.data import DatasetError
from idl.data.files import Fingerprint, Source, read

CONTENT = bytes(range(256)) * 40
REPACKED = b"other header" + CONTENT[20:]
FILE = "values.gz"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without data: an empty ``$IDL_DATA_HOME``."""
    home = tmp_path / "home"
    monkeypatch.setenv("IDL_DATA_HOME", str(home))
    return home


@pytest.fixture
def source(server, tmp_path):
    server.files[FILE] = CONTENT
    return Source(
        name="things",
        url=server.url,
        files={FILE: (Fingerprint.of(CONTENT, "sha256"), Fingerprint.of(REPACKED, "sha256"))},
        package_folder=tmp_path / "package",
        package="dataset-things",
    )


def put(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(content)
    return folder / FILE


def damaged(content: bytes) -> bytes:
    return content[:50] + b"?" + content[51:]


def all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_download_is_kept_and_not_repeated(source, server, home):
    assert read(source, FILE) == CONTENT
    assert read(source, FILE) == CONTENT
    assert server.requests == [FILE]
    assert all_files(home) == [home / "things" / FILE]


def test_without_data_home_a_download_goes_to_the_cache(source, tmp_path, monkeypatch):
    monkeypatch.delenv("IDL_DATA_HOME")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    assert read(source, FILE) == CONTENT
    assert all_files(tmp_path) == [tmp_path / "cache" / "idl" / "things" / FILE]


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_either_hash_tells_a_good_file_from_a_damaged_one(source, server, algorithm):
    source.files[FILE] = (Fingerprint.of(CONTENT, algorithm),)
    assert read(source, FILE) == CONTENT
    source.files[FILE] = (Fingerprint.of(damaged(CONTENT), algorithm),)
    with pytest.raises(DatasetError, match=f"got:      {algorithm}:"):
        read(source, FILE)


def test_the_users_folder_comes_before_the_package(source, server, home):
    put(home / "things", CONTENT)
    put(source.package_folder, b"damaged, but not looked at")
    assert read(source, FILE) == CONTENT
    assert server.requests == []


def test_the_package_comes_before_a_download_and_may_be_packed_otherwise(source, server):
    put(source.package_folder, REPACKED)
    assert read(source, FILE) == REPACKED
    assert server.requests == []


def test_a_file_of_the_package_is_used_even_without_pooch(source, monkeypatch):
    monkeypatch.delenv("IDL_DATA_HOME")
    monkeypatch.setitem(sys.modules, "pooch", None)
    put(source.package_folder, REPACKED)
    assert read(source, FILE) == REPACKED


def test_a_truncated_local_file_is_refused_and_kept(source, server, home):
    path = put(home / "things", CONTENT[:100])
    with pytest.raises(DatasetError) as caught:
        read(source, FILE)
    message = str(caught.value)
    assert str(path) in message
    assert f"expected: {Fingerprint.of(CONTENT, 'sha256')}" in message
    assert f"got:      {Fingerprint.of(CONTENT[:100], 'sha256')} - it was cut short" in message
    assert "Delete it and run again" in message
    assert path.read_bytes() == CONTENT[:100]
    assert server.requests == []


def test_a_damaged_file_of_the_package_is_to_be_installed_again(source):
    put(source.package_folder, damaged(REPACKED))
    with pytest.raises(DatasetError, match=r"bytes\)\n    Install it again: .* --reinstall dataset-things"):
        read(source, FILE)


def test_a_file_that_cannot_be_read_is_one_error(source, home):
    (home / "things" / FILE).mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"things: cannot read .*values\.gz: Is a directory"):
        read(source, FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, r"expected: sha256:\w+ \(10240 bytes\)\n    got:      sha256:\w+ \(10240 bytes\)\n"),
        (lambda content: content[:7], r"got:      sha256:\w+ \(7 bytes\) - it was cut short\n"),
        (lambda content: b"", r"got:      sha256:\w+ \(0 bytes\) - it was cut short\n"),
    ],
)
def test_a_damaged_download_is_not_kept(source, server, home, change, message):
    server.files[FILE] = change(CONTENT)
    with pytest.raises(DatasetError, match=f"(?s)values.gz is not the file .*{message}.*Try again"):
        read(source, FILE)
    assert all_files(home) == []
    server.files[FILE] = CONTENT  # a good copy later is taken
    assert read(source, FILE) == CONTENT


def test_a_connection_that_breaks_leaves_nothing(source, server, home):
    server.cut.add(FILE)
    with pytest.raises(DatasetError, match=r"cannot download http://127\.0\.0\.1:\d+/values\.gz"):
        read(source, FILE)
    assert all_files(home) == []


def test_an_interruption_leaves_nothing(source, home, monkeypatch):
    import requests

    def iter_content(response, chunk_size):
        yield CONTENT[:100]
        assert len(all_files(home)) == 1  # the temporary file
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Response, "iter_content", iter_content)
    with pytest.raises(KeyboardInterrupt):
        read(source, FILE)
    assert all_files(home) == []


def test_a_file_that_the_server_does_not_have_is_one_error(source, server):
    server.files.clear()
    with pytest.raises(DatasetError, match=r"(?s)HTTPError: 404 .*IDL_DATA_HOME"):
        read(source, FILE)


def test_a_missing_network_is_one_error_that_says_what_to_do(source, server, home):
    server.http.server_close()  # the port refuses connections
    with pytest.raises(DatasetError) as caught:
        read(source, FILE)
    message = str(caught.value)
    for part in (
        f"things: cannot download {server.url}{FILE}",
        "ConnectionError",
        f"Looked in: {home / 'things'}, {source.package_folder}\n",
        "put the file at <folder>/things/values.gz and set IDL_DATA_HOME=<folder>",
        source.files[FILE][0].hash,
        "apt-get install dataset-things",
    ):
        assert part in message
    assert "During handling" not in "".join(traceback.format_exception(caught.value))
    assert all_files(home) == []


def test_no_download_means_no_request(source, server):
    with pytest.raises(DatasetError, match=r"values\.gz was not found, and download=False"):
        read(source, FILE, download=False)
    assert server.requests == []


def test_a_folder_that_cannot_be_made_is_one_error(source, home):
    home.write_text("a file where a folder should be")
    with pytest.raises(DatasetError, match="Set IDL_DATA_HOME to a folder"):
        read(source, FILE)


def test_a_download_without_pooch_names_the_extra(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"needs pooch(.|\n)*implicit-deep-learning\[demo\]"):
        read(source, FILE)


@pytest.mark.parametrize("progress", [False, True])
def test_a_terminal_sees_a_progress_bar_if_wanted(source, monkeypatch, capsys, progress):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    assert read(source, FILE, progress=progress) == CONTENT
    output = capsys.readouterr()
    assert output.out == ""
    assert (FILE in output.err and "10.2/10.2 kB" in output.err) is progress
    assert progress or output.err == ""


def test_what_is_not_a_terminal_sees_nothing(source, monkeypatch, capsys):
    import pooch

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    before = pooch.get_logger().level
    assert before <= logging.INFO
    read(source, FILE)
    assert pooch.get_logger().level == before  # it was held back for the time of the download only
    assert capsys.readouterr() == ("", "")
