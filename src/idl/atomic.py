"""Writing a file whole or not at all.

Everything that the library leaves behind goes through here. What the files mean is not known here.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one, never a part.

    The content goes to a temporary file in the same folder, which then takes the place of ``path`` in one
    step. An interruption or a full disk leaves ``path`` as it was, and no temporary file.

    Args:
        path: File to write; its folder must exist.
        content: The whole content.

    Raises:
        FileNotFoundError: If the folder is missing.
        OSError: If the folder is not writable or full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path` must lie in a folder that exists; got {path}. Make {path.parent} first.")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes the file private; a result is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: str | Path, content: Mapping[str, object]) -> None:
    """Write ``content`` to ``path`` as indented JSON, whole or not at all.

    Args:
        path: File to write; its folder must exist.
        content: What to write. Floats come back exactly as they were.

    Raises:
        TypeError: If JSON has no form for a value; the file then stays as it was.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "metrics.json", {"test_loss": 0.5})
    """
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
