"""Outputs that are either absent or complete: written under a temporary name, renamed at the end."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from hybrid_dit.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same ending) to write a file or folder to; renamed to `path` on success.

    On an exception the temporary one is removed and `path` is left as it was. A folder at `path` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, short (prompts make long file names) and with the same ending, by which writers choose their format.
    temporary = path.with_name(f".partial-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Like `atomic_path` for folders that take long to write: what a killed process left is cleared by the next try.

    The temporary name depends on `path` alone (`.NAME.incomplete`), and is locked while somebody writes to it.

    Raises:
        UserError: `path` exists, or another process is writing it.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; remove it or give another name")
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends, however
        except BlockingIOError as error:
            raise UserError(f"another process is writing {path}; wait for it or end it") from error
        for child in temporary.iterdir():
            _remove(child)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            _remove(temporary)
    finally:
        os.close(lock)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
