"""Folders that appear whole or not at all, and names that stay inside their folder."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradot_jax.errors import InputError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def output_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder to fill, and moves it to `path` when the block ends well.

    Whatever ends the block otherwise (an exception, a full disk, an interrupt) removes the new
    folder and leaves at `path` what was there. An older folder is deleted only after the new one
    has taken its place.

    Args:
        path: the folder to make, with its parents; may exist empty.
        overwrite: allow an older, non-empty folder at `path`, which is replaced as a whole.

    Raises:
        InputError: when `path` may not be written, or the disk is full.
    """
    target = Path(path).resolve()
    _check_target(target, overwrite)
    mark = secrets.token_hex(4)
    staging = target.with_name(f".{target.name}.{mark}.new")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be made: {error.strerror}") from None
    try:
        yield staging
        _flush(staging)
        _publish(staging, target, target.with_name(f".{target.name}.{mark}.old"))
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason = os.strerror(error.errno)
            raise InputError(f"{target}: {reason}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: expected a folder, but there is a file of this name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{target}: exists and is not empty; choose another folder or overwrite")
    if any(place.resolve().is_relative_to(target) for place in (Path.cwd(), Path.home())):
        raise InputError(f"{target}: holds the working or home folder and is not overwritten")


def _flush(folder: Path) -> None:
    # Some file systems report a full disk only now, and a rename may outrun the data it names.
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _publish(staging: Path, target: Path, old: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file that a folder, or an index in it, refers to by name.

    The name is a plain base name and the file a regular one, not a symbolic link. One layout of
    links is known and allowed: in a snapshot of the Hugging Face cache
    (`models--*/snapshots/<revision>`) each file links to the cache's own `blobs`.

    Raises:
        InputError: when the file is absent or the name leads out of the folder.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise InputError(f"{folder}: {name!r} is not the plain name of a file in this folder")
    path = folder / name
    if not os.path.lexists(path):
        raise InputError(f"{path}: missing")
    if path.is_symlink() and not _links_into_cache(path):
        raise InputError(
            f"{path}: is a symbolic link out of its folder, expected a regular file; "
            "put a copy of the file in its place"
        )
    if not path.is_file():
        raise InputError(f"{path}: expected a regular file")
    return path


def _links_into_cache(path: Path) -> bool:
    snapshot = path.parent.resolve()
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    # Newer versions of the cache share blobs between repositories, one folder further up.
    blobs = (repository / "blobs", repository.parent / "blobs")
    return any(path.resolve().is_relative_to(folder) for folder in blobs)
