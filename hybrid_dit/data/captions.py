"""Videos in a folder and what they show: a text file beside each one, or one table of all."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

from hybrid_dit.convert.json_file import shown
from hybrid_dit.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
FILE_COLUMNS = ("file", "file_name", "video", "path")
TEXT_COLUMNS = ("caption", "text", "prompt")


class Video(NamedTuple):
    """One video to encode."""

    key: str  # its path in the folder
    path: Path
    caption: str


def find_videos(folder: str | Path, captions: str | Path = "") -> tuple[list[Video], dict[str, str]]:
    """Returns the videos that have a caption, sorted by name, and those left out (name -> reason).

    Args:
        folder: of the videos, subfolders included.
        captions: a CSV with a header or a JSONL of file,caption, paths being relative to `folder`; empty: the caption
            of a/b.mp4 is in a/b.txt.

    Raises:
        UserError: no such folder or table, no video in it, or a table that can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; set --config.build_data.videos to the folder of the videos")
    found: dict[str, Video] = {}
    skipped: dict[str, str] = {}
    if str(captions):
        rows = _read_table(Path(captions))
    else:
        rows = []
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
                name, beside = str(path.relative_to(folder)), path.with_suffix(".txt")
                if beside.is_file():
                    rows.append((name, _read_text(beside, name, skipped)))
                else:
                    skipped[_escaped(name)] = f"there is no caption {_escaped(beside.name)} beside it"
    for name, caption in rows:
        path = folder / name
        if not (_is_utf8(name) and _is_utf8(caption)):  # neither could be written into the set
            skipped[_escaped(name)] = "its name or caption is not UTF-8; change it"
        elif name in found:
            skipped[name] = "it is listed more than once; the first caption was taken"
        elif not name or Path(name).is_absolute() or ".." in Path(name).parts:
            skipped[name or "(no name)"] = "its name leads out of the folder"
        elif not path.is_file():
            skipped[name] = "there is no such file"
        elif not caption.strip():
            skipped.setdefault(name, "its caption is empty")
        else:
            found[name] = Video(name, path, caption.strip())
    if not found:
        some = "".join(f"\n  {shown(name)}: {reason}" for name, reason in list(skipped.items())[:5])
        raise UserError(f"no video with a caption in {folder} (endings: {', '.join(VIDEO_SUFFIXES)}){some}")
    return [found[name] for name in sorted(found)], skipped


def _is_utf8(text: str) -> bool:
    """Returns whether text can be written as UTF-8: Python reads any file name, and JSON may hold half a character."""
    return _escaped(text) == text


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _read_text(path: Path, name: str, skipped: dict[str, str]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        skipped[_escaped(name)] = f"its caption {_escaped(path.name)} can't be read: {shown(error)}"
        return ""


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Returns (file, caption) of every row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            if path.suffix.lower() in (".jsonl", ".ndjson"):
                rows = [json.loads(line) for line in lines if line.strip()]
            else:
                rows = list(csv.DictReader(lines))
    except OSError as error:
        raise UserError(f"the captions {path} can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UserError(f"the captions {path} are not UTF-8 CSV or JSONL: {shown(error)}") from error
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    file, text = (next((c for c in columns if c in first), None) for columns in (FILE_COLUMNS, TEXT_COLUMNS))
    if file is None or text is None:
        raise UserError(
            f"the captions {path} need a column {' or '.join(FILE_COLUMNS)} and one {' or '.join(TEXT_COLUMNS)}; "
            f"found {shown(list(first)) if first else 'no rows'}"
        )
    return [(str(row.get(file) or ""), str(row.get(text) or "")) for row in rows if isinstance(row, dict)]
