"""JSON from elsewhere: bounded in size and depth, no name twice, and errors that say which file."""

import json
import stat
from pathlib import Path

from hybrid_dit.errors import UserError

MAX_BYTES = 100_000_000


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> dict:
    """Returns the object in a JSON file.

    Raises:
        UserError: it is missing, larger than `max_bytes`, not JSON, nested too deep, no object, or has a name twice.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path} is not a file")
        if status.st_size > max_bytes:
            raise UserError(f"{path} has {status.st_size:,} bytes; at most {max_bytes:,} are expected. Fetch it again")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    return parse_object(content, str(path))


def parse_object(content: bytes, where: str) -> dict:
    """Returns the object that UTF-8 encoded JSON holds; `where` starts the error messages.

    Raises:
        UserError: not UTF-8, not JSON, nested too deep, not an object, or a name occurs twice in one of its objects.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deep to be what it should be") from error
    except ValueError as error:  # of JSON, of UTF-8, and integers of thousands of digits
        raise UserError(f"{where} is not valid JSON: {shown(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a JSON {type(value).__name__}, expected an object {{...}}")
    return value


def shown(value: object, width: int = 120) -> str:
    """Returns a value that comes from a file as text that is safe to print: one line, no control characters, short."""
    try:
        text = str(value) if isinstance(value, str | Exception) else repr(value)
    except RecursionError:
        text = "something deeply nested"
    text = text if len(text) <= width else f"{text[: width - 3]}..."
    return text if text.isprintable() else ascii(text)


def _unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {shown(twice)} occurs twice")
    return found
