"""Files that are replaced whole, or not at all, and opened only if they are ordinary ones."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bnexp.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, follow_links: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place when the block ends well.

    At any moment `path` holds the old content or the new one, also after a crash: the file is
    synced before it is renamed, and the folder after. If the block raises, the temporary file is
    removed and `path` is as it was. A symbolic link stays one, and what it points to is replaced;
    without `follow_links` the link itself is. UserError where there is a folder.
    """
    path = Path(os.path.realpath(path)) if follow_links else path
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise UserError(f"{path} is a folder, where a file is to be written: move it away")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every system can sync a folder
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(
    path: Path, content: str | bytes | memoryview, follow_links: bool = True
) -> None:
    """Replace the file at `path` by `content`; `follow_links` as in `replacing`."""
    with replacing(path, follow_links) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def open_ordinary(path: Path) -> BinaryIO:
    """Open the file at `path` to read it. OSError as `open`; UserError, at once, where it is a
    folder, a pipe or a device."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is damaged: it is no ordinary file")
    return open(handle, "rb")
