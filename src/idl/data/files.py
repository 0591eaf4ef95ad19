"""Finding, checking and downloading the files of a data set.

Knows names, places and hashes. What the bytes mean is the business of `formats.py`.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

HOME_VARIABLE = "IDL_DATA_HOME"
_TIMEOUT = 30  # seconds without an answer


class DatasetError(RuntimeError):
    """A data file is missing, damaged or out of reach. The message says which one and what to do.

    Example:
        >>> from idl.data import load
        >>> try:
        ...     dataset = load("cifar10", download=False)
        ... except DatasetError as error:
        ...     advice = str(error)
    """


@dataclass(frozen=True)
class Fingerprint:
    """Hash and length of a file.

    Attributes:
        hash: Name of the algorithm and the digest in hexadecimal, as in ``"sha256:67da..."``.
        size: Length in bytes.
    """

    hash: str
    size: int

    @classmethod
    def of(cls, data: bytes, algorithm: str) -> "Fingerprint":
        """Take the fingerprint of ``data``."""
        digest = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
        return cls(f"{algorithm}:{digest}", len(data))

    def __str__(self) -> str:
        return f"{self.hash} ({self.size} bytes)"


@dataclass(frozen=True)
class Source:
    """Where the files of one data set can be, and how to know them.

    Attributes:
        name: Name of the data set.
        url: Address of the folder on the server, with a slash at its end.
        files: The fingerprints that each file may have. The first is that of the file on the server.
        package_folder: Folder where a package of the system puts the files.
        package: Name of this package, for ``apt-get install``.
        folder: Name of its folder under ``$IDL_DATA_HOME`` or the cache; that of the data set if ``None``.
        on_server: What files are called on the server, where that is something else.
    """

    name: str
    url: str
    files: Mapping[str, tuple[Fingerprint, ...]]
    package_folder: Path | None = None
    package: str | None = None
    folder: str | None = None
    on_server: Mapping[str, str] = field(default_factory=dict)

    def under(self, root: Path) -> Path:
        """Return the folder of the data set under one of all data sets."""
        return root / (self.name if self.folder is None else self.folder)


def read(source: Source, file: str, *, download: bool = True, progress: bool = True) -> bytes:
    """Find one file, downloading it if need be, and return its content, checked.

    The places are, in this order: ``$IDL_DATA_HOME/<name>`` if the variable is set, the folder of the
    system's package if there is one, and, if the variable is not set, the user's cache. A download is kept in
    ``$IDL_DATA_HOME/<name>`` or in the cache. (``<name>`` is ``source.folder`` where that is given.)

    Args:
        source: The data set.
        file: One of ``source.files``.
        download: Whether to use the network for a file that is in none of these places.
        progress: Whether to show a progress bar while downloading, if standard error is a terminal.

    Returns:
        The bytes of the file as stored: still compressed.

    Raises:
        DatasetError: If the file is nowhere, cannot be read or downloaded, or has a wrong hash.
        ImportError: If a package of the extra ``demo`` is needed and missing.
    """
    looked_in = []
    for folder in _folders(source):
        looked_in.append(folder)
        path = folder / file
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DatasetError(f"{source.name}: cannot read {path}: {error.strerror}.") from None
        if mismatch := _mismatch(data, source.files[file]):
            raise DatasetError(
                f"{source.name}: {path} is damaged, or is another file.\n{mismatch}    {_cure(source, path)}"
            )
        return data
    if not download:
        raise DatasetError(
            f"{source.name}: {file} was not found, and download=False.\n" + _without_network(source, file, looked_in)
        )
    return _download(source, file, looked_in, progress=progress).read_bytes()


def _folders(source: Source) -> Iterator[Path]:
    """The folders to look in. Lazy: the cache is asked for only if the others had nothing."""
    home = _home()
    if home:
        yield source.under(home)
    if source.package_folder:
        yield source.package_folder
    if not home:
        yield source.under(_cache())


def _home() -> Path | None:
    home = os.environ.get(HOME_VARIABLE)
    return Path(home).expanduser() if home else None


def _cache() -> Path:
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return Path(pooch.os_cache("idl"))


def _download(source: Source, file: str, looked_in: list[Path], *, progress: bool) -> Path:
    """Download one file. It gets its name only when it is complete and checked."""
    try:
        import pooch
        import requests
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    url, folder = source.url + source.on_server.get(file, file), source.under(_home() or _cache())
    expected = source.files[file][:1]

    def fetch(url: str, output: str, caller: object) -> None:
        # pooch deletes `output`, a temporary file, if anything is raised here, an interruption included.
        with _progress_bar(file) if progress else nullcontext(False) as bar:
            downloader = pooch.HTTPDownloader(
                progressbar=bar, timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"}
            )
            downloader(url, output, caller)
        if mismatch := _mismatch(Path(output).read_bytes(), expected):
            raise DatasetError(
                f"{source.name}: what came from {url} is not the file it should be, and was not kept.\n"
                + mismatch
                + f"    Try again. If it happens again, put a good copy at {folder / file}."
            )

    try:
        with _quiet(pooch.get_logger()):
            return Path(pooch.retrieve(url, known_hash=expected[0].hash, fname=file, path=folder, downloader=fetch))
    except requests.RequestException as error:
        raise DatasetError(
            f"{source.name}: cannot download {url}\n    because of {type(error).__name__}: {error}\n"
            + _without_network(source, file, looked_in)
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{source.name}: cannot write {folder / file}: {error.strerror or error}.\n"
            f"    Set {HOME_VARIABLE} to a folder with space that you may write to."
        ) from None


def _mismatch(data: bytes, accepted: tuple[Fingerprint, ...]) -> str:
    """Two lines that compare ``data`` with the first of the fingerprints, or nothing if one of them fits."""
    got = [Fingerprint.of(data, fingerprint.hash.partition(":")[0]) for fingerprint in accepted]
    if any(a == b for a, b in zip(accepted, got, strict=True)):
        return ""
    cut_short = " - it was cut short" if got[0].size < min(a.size for a in accepted) else ""
    return f"    expected: {accepted[0]}\n    got:      {got[0]}{cut_short}\n"


def _cure(source: Source, path: Path) -> str:
    if path.parent == source.package_folder:
        return f"Install it again: apt-get install --reinstall {source.package}"
    return "Delete it and run again to download it, or put a good copy in its place."


def _without_network(source: Source, file: str, looked_in: list[Path]) -> str:
    place = source.under(Path("<folder>")) / file
    lines = [
        "    Looked in: " + ", ".join(map(str, looked_in)),
        f"    Without network: put the file at {place} and set {HOME_VARIABLE}=<folder>.",
        f"    It is known by its hash {source.files[file][0]}.",
    ]
    if source.package:
        lines.append(f"    On Debian and Ubuntu also: apt-get install {source.package}")
    return "\n".join(lines)


def _missing(error: ModuleNotFoundError) -> ImportError:
    return ImportError(
        f"idl.data needs {error.name} to look for this data set in the cache or to download it.\n"
        "    Install the extra: pip install 'implicit-deep-learning[demo]'"
    )


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Hold back the notes of ``logger``: the progress bar says enough."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _progress_bar(file: str) -> "Iterator[_Bar]":
    """Show a bar on standard error, if that is a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(file, total=None)
        yield _Bar(lambda done, total: bars.update(task, completed=done, total=total))


class _Bar:
    """What pooch wants of a progress bar: ``total``, ``update``, ``reset`` and ``close``."""

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self.total = 0
        self._done = 0
        self._show = show

    def update(self, count: int) -> None:
        self._done += count
        self._show(min(self._done, self.total or self._done), self.total or self._done)

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        """Do nothing: pooch asks for it, and the bar belongs to the caller."""
