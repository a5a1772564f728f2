"""Round trips through H.264, timing, atomic writing, and what bad files and arrays say."""

import av
import numpy as np
import pytest

from hybrid_dit import video_io
from hybrid_dit.errors import UserError


def _video(frames=6, height=32, width=48):
    """Smooth colours that move, so that 4:2:0 colour resolution costs little."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    phase = np.stack([x + 2 * t, y - t, x + y + 3 * t], axis=-1)
    return np.round(127.5 + 100 * np.sin(phase / 8)).astype(np.uint8)


def _psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("crf,decibel", [(0, 45), (12, 39)])
def test_round_trip(tmp_path, crf, decibel):
    video = _video()
    video_io.write_mp4(tmp_path / "v.mp4", video, crf=crf)
    back = video_io.read_mp4(tmp_path / "v.mp4")
    assert back.shape == video.shape and back.dtype == np.uint8
    # crf 0 is lossless, so what is lost is colour resolution: 46.8 dB (with repeated colour samples 34.2, shifted ones
    # 37.5). crf 12 measures 41.7 dB on this pattern, crf 16 39.2.
    assert _psnr(video, back) > decibel
    # Frames come in order: each is nearest to its own original (the neighbours' are 22 dB away).
    for i, frame in enumerate(back):
        assert int(np.argmax([_psnr(original, frame) for original in video])) == i


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 160, 30)])
def test_flat_colours_survive(tmp_path, colour):
    video = np.broadcast_to(np.array(colour, np.uint8), (2, 16, 16, 3))
    video_io.write_mp4(tmp_path / "v.mp4", video)
    # 8-bit limited-range YUV: half a step of Y (255/219/2) and of a chroma (1.77 * 255/224 / 2), and rounding: under 3.
    assert np.abs(video_io.read_mp4(tmp_path / "v.mp4").astype(int) - video).max() <= 3


def test_quality_follows_crf(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    for crf in (5, 40):
        video_io.write_mp4(tmp_path / f"{crf}.mp4", video, crf=crf)
    assert (tmp_path / "5.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size


@pytest.mark.parametrize("fps", [16, 8, 23.976])
def test_frame_rate_and_format(tmp_path, fps):
    video_io.write_mp4(tmp_path / "v.mp4", _video(), fps=fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)  # 23.976 is written as the fraction nearest
        assert float(stream.duration * stream.time_base) == pytest.approx(6 / fps, rel=0.02)
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert int(stream.codec_context.colorspace) == 6  # BT.601, as converted


def test_names_of_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = "file: a dog, 50% %d v1.5 " + "x" * 220  # looks like a protocol, a pattern, an extension; near 255 bytes
    video_io.write_mp4(f"{prompt}-0.mp4", _video(2))
    assert video_io.read_mp4(f"{prompt}-0.mp4").shape == (2, 32, 48, 3)
    assert [p.name for p in tmp_path.iterdir()] == [f"{prompt}-0.mp4"]


def test_write_goes_through_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_dit.atomic.os.replace", lambda *_: None)
    video_io.write_mp4(tmp_path / "v.mp4", _video(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name,shape,dtype,message",
    [
        ("v.avi", (2, 16, 16, 3), np.uint8, "must end in .mp4"),
        ("v.mp4", (2, 16, 16, 3), np.float32, "uint8"),
        ("v.mp4", (2, 3, 16, 16), np.uint8, r"got uint8 \[2, 3, 16, 16\]"),
        ("v.mp4", (0, 16, 16, 3), np.uint8, r"got uint8 \[0, "),
        ("v.mp4", (2, 16, 15, 3), np.uint8, "even.* got 16x15"),
    ],
)
def test_bad_videos_are_explained(tmp_path, name, shape, dtype, message):
    with pytest.raises(UserError, match=message):
        video_io.write_mp4(tmp_path / name, np.zeros(shape, dtype))
    assert list(tmp_path.iterdir()) == []


def test_a_video_needs_frames_per_second(tmp_path):
    for fps in (0, -3):
        with pytest.raises(UserError, match=f"positive number of frames per second, got {fps}"):
            video_io.write_mp4(tmp_path / "v.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_explained(tmp_path):
    with pytest.raises(UserError, match="can't open .*No such file"):
        video_io.read_mp4(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match="text.mp4"):
        video_io.read_mp4(tmp_path / "text.mp4")
    video_io.write_mp4(tmp_path / "v.mp4", _video())
    (tmp_path / "half.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:2000])
    with pytest.raises(UserError, match="half.mp4"):
        video_io.read_mp4(tmp_path / "half.mp4")
