"""The videos of all variants for a page with a limited size: as they are, else smaller, else fewer of them."""

import dataclasses
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from hybrid_dit.errors import UserError
from hybrid_dit.video_io import read_mp4, write_mp4

VARIANTS = ("teacher", "undistilled", "distilled", "finetuned")  # first, in this order
MOST = 8  # prompts: browsers, on phones above all, limit how many videos a page has
LEVELS = ((320, 20), (240, 26), (160, 32))  # (shorter side in pixels, crf) to try where originals don't fit


@dataclasses.dataclass(frozen=True)
class Clip:
    """One MP4 file's bytes and what is in them."""

    data: bytes
    width: int
    height: int
    frames: int
    fps: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt: its text as the file name has it, its index, and a file or clip per variant."""

    prompt: str
    index: int
    clips: Mapping[str, Path | Clip]


@dataclasses.dataclass(frozen=True)
class Films:
    """What a page shows, and sentences on what was shrunk or left out."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def find(folder: Path) -> list[Row]:
    """Returns the rows of `folder/VARIANT/PROMPT-INDEX.mp4` by index; a variant may be missing from a row."""
    order = {name: i for i, name in enumerate(VARIANTS)}
    rows: dict[tuple[int, str], dict[str, Path]] = {}
    for path in sorted(folder.glob("*/*.mp4"), key=lambda path: (order.get(path.parent.name, 99), path)):
        match = re.fullmatch(r"(.*)-(\d+)", path.stem, re.DOTALL)
        if match and not path.name.startswith("."):  # what an interrupted writer left
            rows.setdefault((int(match[2]), match[1]), {})[path.parent.name] = path
    return [Row(prompt, index, clips) for (index, prompt), clips in sorted(rows.items(), key=lambda item: item[0])]


def embed(rows: Sequence[Row], budget: int) -> Films:
    """Reads the videos of as many rows as fit.

    Args:
        rows: with paths.
        budget: bytes of all files together.

    Returns:
        Rows with clips, all treated alike; those at the end are left out if even the smallest don't fit.
    """
    notes = []
    if len(rows) > MOST:
        notes.append(f"The first {MOST} of {len(rows)} prompts are shown.")
        rows = rows[:MOST]
    good, broken = [], []
    for row in rows:
        clips = {}
        for name, path in row.clips.items():
            try:
                clips[name] = read_clip(path)
            except UserError:
                broken.append(f"{name}/{path.name}")
        if clips:
            good.append(dataclasses.replace(row, clips=clips))
    if broken:
        notes.append(f"Not readable and left out: {'; '.join(broken)}.")
    if _bytes(good) <= budget:
        return Films(tuple(good), tuple(notes))
    for side, crf in LEVELS:
        small, left = [], budget
        for row in good:
            shrunk = dataclasses.replace(row, clips={k: shrink(clip, side, crf) for k, clip in row.clips.items()})
            left -= _bytes([shrunk])
            if left < 0:
                break
            small.append(shrunk)
        if len(small) == len(good):
            break
    if small:
        sizes = sorted({f"{clip.width} x {clip.height}" for row in small for clip in row.clips.values()})
        how = f"{', '.join(sizes)}, x264 crf {crf}"
        notes.append(f"Videos are compressed more than the originals ({how}) to keep the page small.")
    if len(small) < len(good):
        notes.append(f"{len(good) - len(small)} of {len(good)} prompts are left out to keep the page small.")
    return Films(tuple(small), tuple(notes))


def read_clip(path: Path) -> Clip:
    """Reads a file without decoding its frames.

    Raises:
        UserError: not a video.
    """
    data = path.read_bytes()
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            return Clip(data, stream.width, stream.height, stream.frames, float(stream.average_rate))
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise UserError(f"{path} is not a readable video") from error


def shrink(clip: Clip, side: int, crf: int) -> Clip:
    """Returns the clip with its shorter side at most `side` pixels, compressed with x264's quality `crf`."""
    shorter = min(clip.width, clip.height)
    side = min(side, shorter)
    width, height = (max(2, size * side // shorter // 2 * 2) for size in (clip.width, clip.height))  # H.264 wants even
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(clip.data)
        images = [Image.fromarray(frame) for frame in read_mp4(path)]
        frames = [
            np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)) for image in images
        ]
        write_mp4(path, np.stack(frames), fps=clip.fps, crf=crf)
        return read_clip(path)


def _bytes(rows: Sequence[Row]) -> int:
    return sum(len(clip.data) for row in rows for clip in row.clips.values())
