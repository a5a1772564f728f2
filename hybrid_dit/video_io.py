"""Videos as H.264 in MP4 files, written and read through PyAV (no ffmpeg program needed)."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from jaxtyping import UInt8

from hybrid_dit.atomic import atomic_path
from hybrid_dit.errors import UserError

_BT601 = {"color_primaries": 6, "color_trc": 6, "colorspace": 6, "color_range": 1}  # H.264 Table E-3..E-5; 1: limited
# Without these flags libswscale repeats and drops chroma samples: 34 dB instead of 47 on a smooth moving pattern.
CHROMA = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
)


def write_mp4(path: str | Path, video: np.ndarray, fps: int | float = 16, crf: int = 12) -> None:
    """Writes uint8 RGB frames [t, y, x, 3] as H.264, yuv420p; atomic.

    Args:
        path: must end in .mp4; replaced if it exists.
        video: height and width must be even, since colour has half the resolution.
        fps: frames per second (Wan's is 16).
        crf: x264's quality; 0 is lossless, 12 is hard to tell from the original, 23 is x264's own default.

    Raises:
        UserError: another extension, dtype or shape, an odd size, or no frames per second.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise UserError(f"can't write a video to {path}: the name must end in .mp4")
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"{path}: a video is uint8 [frames, height, width, 3], got {video.dtype} {list(video.shape)}")
    _, height, width, _ = video.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: height and width must be even for H.264 with yuv420p, got {height}x{width}")
    if not fps > 0:
        raise UserError(f"{path}: a video needs a positive number of frames per second, got {fps}")
    # Files are passed open: libav would take "a: b.mp4" for the name of a protocol.
    with atomic_path(path) as temporary, open(temporary, "wb") as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # chromaloc=1: colour samples lie amid their four pixels, where the conversion below puts them; H.264
        # assumes the left edge otherwise, and colours come back shifted by half a pixel (5 dB).
        stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "chromaloc=1"}
        for name, value in _BT601.items():  # what the conversion below does; unlabelled, players guess by size
            setattr(stream.codec_context, name, value)
        for image in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", interpolation=CHROMA)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_mp4(path: str | Path) -> UInt8[np.ndarray, "t y x 3"]:
    """Returns all frames of the first video stream of a file as RGB.

    Raises:
        UserError: no such file, not a video, or no frames in it.
    """
    try:
        with open(path, "rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream")
            frames = [f.to_ndarray(format="rgb24", interpolation=CHROMA) for f in container.decode(video=0)]
    except OSError as error:  # also the base class of PyAV's file errors
        raise UserError(f"can't open {path}: {error.strerror or error}") from error
    except av.FFmpegError as error:
        raise UserError(f"{path} is not a readable video ({error.strerror}); was its writing interrupted?") from error
    if not frames:
        raise UserError(f"{path} holds a video stream without frames")
    return np.stack(frames)
