"""Which videos a suite expects under which names, and which of them are there.

VBench reads one flat folder of `{prompt}-{i}.mp4`, i = 0 to 4 (0 to 24 for temporal_flickering, before its static
filter); it takes the ending from the first file it meets, so nothing else may lie there, and leaves out missing
videos with a warning. VBench-2.0 reads `{dimension}/{prompt[:180]}-{i}.mp4`, i = 0 to 2 (0 to 19 for Diversity), and
stops at a missing one. Names are those of the original prompts, whatever text the model was given.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hybrid_dit.errors import UserError
from hybrid_dit.vbench.facts import SUITES, Suite, get_suite

_SHOWN = 5  # names in a message


class SuitePrompt(NamedTuple):
    """An original prompt and the dimensions that judge its videos (none known: empty)."""

    text: str
    dimensions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Video:
    """One video to sample.

    Attributes:
        name: the original prompt; decides the noise, together with `index`.
        prompt: what the model is given.
        index: which video of the prompt.
        files: where it belongs, relative to the suite's folder: in VBench-2.0 a prompt may be in several dimensions.
    """

    name: str
    prompt: str
    index: int
    files: tuple[str, ...]


def videos_of(cfg) -> list[Video]:
    """Returns the videos that the config's section `suite` asks for, the order of its prompts kept.

    Raises:
        UserError: unknown suite or dimension, or what is wrong with one of the files.
    """
    suite = get_suite(cfg.name)
    prompts = read_suite(suite, cfg.prompts)
    texts = rewritten(prompts, cfg.rewritten, cfg.originals)
    unknown = [name for name in cfg.dimensions if name not in suite.dimensions]
    if unknown:
        raise UserError(f"{suite.title} has no dimension {unknown[0]!r}; it has {', '.join(suite.dimensions)}")
    return layout(suite, prompts, texts, cfg.dimensions)


def read_suite(suite: Suite, path: str | Path) -> list[SuitePrompt]:
    """Returns the prompts in a file or folder of a suite, in order.

    Args:
        suite: whose.
        path: the suite's own `VBench_full_info.json` or `VBench2_full_info.json`; or a folder of lists named after
            dimensions (`prompts/prompts_per_dimension`, `VBench-2.0/prompts/prompt`); or, for VBench, a plain list.

    Raises:
        UserError: nothing there or another format, an unknown dimension, or a plain list for VBench-2.0, which needs
            to know the dimensions.
    """
    path = Path(path)
    if not str(path) or path == Path():
        raise UserError("no prompts of the suite given; set --config.suite.prompts to its full_info.json")
    if path.is_dir():
        lists = sorted(path.glob("*.txt"))
        prompts = [SuitePrompt(line, (file.stem,)) for file in lists for line in _lines(file)]
    elif path.suffix == ".json":
        prompts = _read_full_info(path)
    elif suite.folders:
        raise UserError(
            f"{path} is a plain list, but {suite.title} needs to know every prompt's dimension; give its "
            "full_info.json, or the folder of lists named after dimensions"
        )
    else:
        prompts = [SuitePrompt(line, ()) for line in _lines(path)]
    if not prompts:
        raise UserError(f"{path} has no prompt in it")
    for prompt in prompts:
        for name in prompt.dimensions:
            if name not in suite.dimensions:
                other = [s for s in SUITES.values() if name in s.dimensions]
                hint = f"; it is one of {other[0].title}'s (--config.suite.name={other[0].name})" if other else ""
                raise UserError(f"{path}: {suite.title} has no dimension {name!r}{hint}")
    return prompts


def rewritten(prompts: Sequence[SuitePrompt], path: str | Path, originals: str | Path = "") -> list[str]:
    """Returns the text that the model is given for every prompt: itself, or its line in a list of rewritten ones.

    Args:
        prompts: of the suite.
        path: list of rewritten prompts, or a folder with one per dimension (`{dimension}.txt`); empty: none.
        originals: the list, or folder, that `path` follows line by line; empty: that of `prompts`.

    Raises:
        UserError: the lists have different lengths, or a prompt is missing.
    """
    if not path:
        return [prompt.text for prompt in prompts]
    path = Path(path)
    dimensions = dict.fromkeys(name for prompt in prompts for name in prompt.dimensions) if path.is_dir() else [""]
    found: dict[tuple[str, str], str] = {}
    for dimension in dimensions:
        of = [prompt.text for prompt in prompts if not dimension or dimension in prompt.dimensions]
        before = Path(originals) / f"{dimension}.txt" if originals and dimension else originals
        old, source = (_lines(Path(before)), before) if originals else (of, "the suite")
        file = path / f"{dimension}.txt" if dimension else path
        new = _lines(file)
        if len(old) != len(new):
            raise UserError(
                f"{file} has {len(new)} lines, but {source} has {len(old)} prompts; they must correspond line by line "
                "(suite.originals names the list that the rewritten ones follow)"
            )
        for a, b in zip(old, new):  # the first line counts if a prompt is listed twice, as two of VBench's are
            found.setdefault((dimension, a), b)
    keys = [(prompt.dimensions[0] if path.is_dir() else "", prompt.text) for prompt in prompts]
    missing = [text for dimension, text in keys if (dimension, text) not in found]
    if missing:
        raise UserError(f"{path}: no line for {len(missing)} prompts of the suite, such as {missing[0][:80]!r}")
    return [found[key] for key in keys]


def layout(
    suite: Suite, prompts: Sequence[SuitePrompt], texts: Sequence[str], dimensions: Sequence[str] = ()
) -> list[Video]:
    """Returns the videos of prompts; one that several dimensions ask for is listed once.

    Args:
        suite: whose names and counts.
        prompts: from `read_suite`.
        texts: what the model is given for each.
        dimensions: those to make videos for; empty: all.

    Raises:
        UserError: a prompt can't be a file's name, or two of one dimension would get the same.
    """
    owner: dict[str, str] = {}
    files: dict[tuple[str, str, int], list[str]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        asked = [name for name in prompt.dimensions if not dimensions or name in dimensions]
        if dimensions and not asked:
            continue
        stem = prompt.text[: suite.cut]
        _check_name(f"{stem}-00.mp4")
        for folder, judges in [(name, [name]) for name in asked] if suite.folders else [("", asked)]:
            for i in range(max(map(suite.samples_of, judges), default=suite.samples)):
                file = f"{folder}/{stem}-{i}.mp4" if folder else f"{stem}-{i}.mp4"
                if file not in owner:  # the suite may list a prompt twice
                    owner[file] = prompt.text
                    files.setdefault((prompt.text, text, i), []).append(file)
                elif owner[file] != prompt.text:
                    raise UserError(f"two prompts would both be called {file}; {suite.title} can't tell them apart")
    return [Video(*key, tuple(listed)) for key, listed in files.items()]


def of_share(videos: Sequence[Video], share: str) -> list[Video]:
    """Returns the videos of one process: "2/8" is every eighth, from the third on ("0/1": all).

    Raises:
        UserError: not two whole numbers, or the first is not below the second.
    """
    try:
        number, count = map(int, share.split("/"))
    except ValueError:
        number, count = 0, 0
    if not 0 <= number < count:
        raise UserError(f"sample.share={share!r} must be NUMBER/PROCESSES, from 0/8 to 7/8 for eight processes")
    return list(videos[number::count])


class Progress(NamedTuple):
    """What of a suite is in its folder; all names relative to it."""

    total: int
    missing: list[str]
    broken: list[str]  # cut off, or no MP4
    stray: list[str]  # what the suite doesn't expect there

    @property
    def complete(self) -> bool:
        """Whether the suite can be evaluated as it is."""
        return not (self.missing or self.broken or self.stray)

    def __str__(self) -> str:
        parts = [f"{self.total - len(self.missing) - len(self.broken):,} of {self.total:,} videos"]
        for what in ("missing", "broken", "stray"):
            names = getattr(self, what)
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            parts += [f"{what}: {', '.join(map(repr, names[:_SHOWN]))}{more}"] if names else []
        return ", ".join(parts)


def check(folder: Path, expected: Sequence[Video], known: Sequence[Video] = ()) -> Progress:
    """Compares a suite's folder with what should be in it.

    Args:
        folder: of the suite.
        expected: videos that should be there.
        known: videos that may be there too (other dimensions).
    """
    files = [file for video in expected for file in video.files]
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    there = {name: path for name, path in found.items() if path.is_file()}
    allowed = {*files, *(file for video in known for file in video.files)}
    parents = {parent.as_posix() for file in allowed for parent in PurePosixPath(file).parents}
    missing = [file for file in files if file not in there]
    broken = [file for file in files if file in there and not is_whole_mp4(there[file])]
    # Folders, too: VBench takes the names' ending from whatever its listing has first.
    stray = [name for name, path in found.items() if name not in (parents if path.is_dir() else allowed)]
    return Progress(len(files), missing, broken, stray)


def is_whole_mp4(path: Path) -> bool:
    """Says whether a file consists of whole MP4 boxes (ISO 14496-12) with an index among them; decodes nothing."""
    kinds, position = set(), 0
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while position < end:
            file.seek(position)
            header = file.read(16)
            if len(header) < 8:
                return False
            size, kind = struct.unpack(">I4s", header[:8])
            if size == 1 and len(header) == 16:  # the size follows, in 64 bits
                size = struct.unpack(">Q", header[8:])[0]
            if size < 8:  # 0 means "to the end": nothing that we write
                return False
            kinds.add(kind)
            position += size
    return position == end and {b"ftyp", b"moov", b"mdat"} <= kinds


def _read_full_info(path: Path) -> list[SuitePrompt]:
    """Reads the suites' own JSON: a list of {"prompt_en": text, "dimension": [names], ...}."""
    try:
        entries = json.loads(path.read_bytes())
        return [SuitePrompt(str(entry["prompt_en"]), tuple(entry["dimension"])) for entry in entries]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f'{path} is not a suite\'s full_info.json, a list of {{"prompt_en": ..., "dimension": [...]}} '
            f"({type(error).__name__}: {error})"
        ) from error


def _lines(path: Path) -> list[str]:
    """Returns the lines of a list, stripped; none may be empty, since lists correspond line by line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; write one prompt a line")
    return lines


def _check_name(name: str) -> None:
    if "/" in name or "\x00" in name or len(name.encode()) > 255:
        raise UserError(f"a file can't be called {name[:80]!r}: it has a slash in it, or more than 255 bytes")
