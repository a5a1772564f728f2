"""The builder: right numbers, every video accounted for, and no trace of interruptions or of who built what."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from pipelines import random_pipeline
from workdirs import tiny_config

from hybrid_dit import generation
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.data.clips import Bucket, read_clip
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import build_data
from hybrid_dit.video_io import write_mp4

CAPTIONS = {
    "a.mp4": "a small red circle moving left on a gray background",
    "b.mp4": "a large blue square moving up on a black background",
    "c.mp4": "a small cyan triangle moving right on a white background",
    "short.mp4": "a small red circle moving left on a white background",
    "torn.mp4": "a large red circle moving left on a white background",
}
BUCKETS = "9x32x32,1x32x48"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("build")
    random_pipeline(root / "pipeline")
    (root / "prompts.txt").write_text("\n".join(CAPTIONS.values()))
    rng, videos = np.random.default_rng(0), root / "videos"
    sizes = {"a.mp4": (10, 32, 32), "b.mp4": (7, 32, 48), "c.mp4": (9, 48, 48), "short.mp4": (3, 32, 32)}
    for name, caption in CAPTIONS.items():
        (videos / name).parent.mkdir(exist_ok=True)
        (videos / name).with_suffix(".txt").write_text(caption)
        if name in sizes:
            t, y, x = sizes[name]
            coarse = rng.integers(0, 256, (t, y // 8, x // 8, 3)).astype(np.uint8)
            write_mp4(videos / name, coarse.repeat(8, axis=1).repeat(8, axis=2), crf=1)
    (videos / "torn.mp4").write_bytes((videos / "a.mp4").read_bytes()[:500])
    write_mp4(videos / "silent.mp4", np.zeros((9, 32, 32, 3), np.uint8))  # has no caption
    for ending in ("mp4", "txt"):
        (videos / f"caf\udce9.{ending}").write_bytes((videos / f"a.{ending}").read_bytes())  # Latin-1
    return root


def make_config(root, **changes):
    values = {"videos": root / "videos", "buckets": BUCKETS, "shard": 2, "threads": 2} | changes
    return tiny_config("build_data", root, **{f"build_data__{k}": v for k, v in values.items()})


def files(folder):
    """Everything that belongs to the set, byte by byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def built(root):
    build_data.run(make_config(root), root / "reference")
    return root / "reference" / "data"


def test_samples_are_the_encoders_and_all_else_is_accounted_for(root, built):
    pipeline = load_pipeline(root / "pipeline")
    rows = {r["key"].decode(): r for r in tfds.builder_from_directory(built).as_data_source(split="train")}
    assert list(rows) == ["a.mp4", "b.mp4", "c.mp4"] and rows["b.mp4"]["latents"].shape == (1, 4, 6, 4)
    clips = [read_clip(root / "videos" / name, [Bucket(9, 32, 32)], 16, 1.5)[1] for name in ("a.mp4", "c.mp4")]
    encode = jax.jit(functools.partial(generation.encode_video, pipeline.vae))
    expected = np.asarray(encode(pipeline.vae_params, np.stack(clips).astype(np.float32) / 127.5 - 1), np.float64)
    # Rounded to bfloat16 (2^-8 of each number), after encoding in pieces instead of whole: float32 sums in another
    # order, 1e-3 of the largest (see test_pairs).
    bound = np.abs(expected) / 256 + 1e-3 * np.abs(expected).max()
    found = np.stack([rows[name]["latents"] for name in ("a.mp4", "c.mp4")])
    assert found.dtype == ml_dtypes.bfloat16 and (np.abs(found.astype(np.float64) - expected) <= bound).all()
    for name, row in rows.items():
        text, count = (np.asarray(x) for x in generation.text_context(pipeline, [CAPTIONS[name]]))
        own = text[0, : int(count[0, :-1].sum())].astype(np.float64)
        assert row["prompt"].decode() == CAPTIONS[name] and row["text"].shape == own.shape
        # bfloat16, and batches of another size in float32 (sums over at most 16 numbers)
        assert (np.abs(row["text"].astype(np.float64) - own) <= np.abs(own) / 256 + 1e-5).all()
    skipped = (built / "skipped.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in skipped[1:]] == [
        '"caf\\udce9.mp4"',
        '"short.mp4"',
        '"silent.mp4"',
        '"torn.mp4"',
    ]
    assert "its name or caption is not UTF-8" in skipped[1]
    assert "it has 3 frames at 16 per second, 9x32x32 needs more" in skipped[2] and "no caption" in skipped[3]
    manifest = json.loads((built / "manifest.json").read_text())
    assert (manifest["samples"], manifest["skipped"], manifest["text_tokens"]) == (3, 4, 512)


def test_a_complete_set_is_left_alone(root, built, capsys):
    before = files(built)
    build_data.run(make_config(root), root / "reference")
    assert "complete in" in capsys.readouterr().out and files(built) == before
    with pytest.raises(UserError, match="made with other settings"):
        build_data.run(make_config(root, fps=8.0), root / "reference")


def test_processes_share_a_set_and_the_last_one_completes_it(root, built, tmp_path, capsys):
    for process in (1, 0, 2):  # each takes one of three shards
        assert not (tmp_path / "data" / "manifest.json").exists()
        build_data.run(make_config(root, process=process, processes=3), tmp_path)
    told = capsys.readouterr().out
    assert "process 1 is done; 2 of 3 shards are the others'" in told and "3 samples in" in told
    assert files(tmp_path / "data") == files(built)


def test_an_exception_in_the_middle_costs_one_shard(root, built, tmp_path, monkeypatch):
    encode, calls = build_data.Encoder.__call__, []

    def fails_at_the_second(self, clips, advance):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, clips, advance)

    monkeypatch.setattr(build_data.Encoder, "__call__", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build_data.run(make_config(root), tmp_path)
    build_data.run(make_config(root), tmp_path)
    assert len(calls) == 4 and files(tmp_path / "data") == files(built)


def test_moving_shapes(root, tmp_path):
    build_data.run(make_config(root, videos="", shapes=3, buckets="9x32x32", dtype="float32"), tmp_path)
    rows = list(tfds.builder_from_directory(tmp_path / "data").as_data_source(split="train"))
    assert [row["latents"].shape for row in rows] == [(3, 4, 4, 4)] * 3 and rows[0]["latents"].dtype == np.float32
    assert all(b" moving " in row["prompt"] for row in rows) and len({row["prompt"] for row in rows}) == 3
    cfg = make_config(root, videos="", shapes=3, buckets="9x32x32", dtype="float32").build_data
    items, _ = build_data._items(cfg, [Bucket(9, 32, 32), Bucket(5, 32, 32)], seed=0)
    assert [item.clip()[0].frames for item in items[:2]] == [9, 5]  # buckets take turns
    np.testing.assert_array_equal(items[2].clip()[1], items[2].clip()[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"videos": "", "shapes": 0}, "nothing to encode"),
        ({"buckets": ""}, "build_data.buckets is empty"),
        ({"buckets": "9x32"}, "is not FRAMESxHEIGHTxWIDTH"),
        ({"buckets": "8x32x32"}, "frames=8 is not 4n . 1"),
        ({"buckets": "9x32x40"}, "width=40 is not a multiple of 16"),
        ({"videos": "", "shapes": 2, "buckets": "9x32x48"}, "moving shapes are square"),
        ({"dtype": "float16"}, "are float32 or bfloat16"),
        ({"process": 2, "processes": 2}, "build_data.process=2 is not one of 2"),
        ({"videos": "/nowhere"}, "there is no folder /nowhere"),
        ({"shard": 0}, "build_data.shard=0 must be more than 0"),
        ({"batch": 0}, "build_data.batch=0 must be more than 0"),
        ({"fps": -1.0}, "build_data.fps=-1.0 must be from 0.01 to 1000 frames per second"),
        ({"fps": 0.0001}, "build_data.fps=0.0001 must be from 0.01"),
        ({"enlarge": 0.0}, "build_data.enlarge=0.0 must be more than 0"),
        ({"videos": "", "shapes": 2, "captions": "a.csv"}, "captions needs the videos"),
    ],
)
def test_what_can_not_be_built_is_told_and_not_kept(root, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_data.run(make_config(root, **changes), tmp_path)
    assert not list(tmp_path.iterdir())  # the same workdir takes the settings that are right


def test_other_captions_are_told(root, tmp_path, monkeypatch):
    table = tmp_path / "captions.csv"
    config = make_config(root, captions=table)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_data.Encoder, "__call__", interrupted)
    for text, error in (("one", KeyboardInterrupt), ("one", KeyboardInterrupt), ("other", UserError)):
        table.write_text(f"file,caption\na.mp4,{text}\n")
        with pytest.raises(error, match="other videos or captions" if error is UserError else None):
            build_data.run(config, tmp_path / "run")


# The parent computes nothing with JAX, so that it can fork; the encoder is a stand-in that takes its time.
PROGRAM = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer
sys.path[:0] = sys.argv[3:]
from workdirs import tiny_config
from hybrid_dit.data.shards import Record
from hybrid_dit.jobs import build_data

class Slow:
    def __init__(self, pipeline, batch, dtype, compute_dtype):
        self.dtype = build_data.DTYPES[dtype]

    def __call__(self, clips, advance):
        records, bad = [], {}
        for item, bucket, clip in clips:
            time.sleep(0.04)
            if bucket is None:
                bad[item.key] = clip
                continue
            latents = np.resize(clip[::4, ::8, ::8].astype(self.dtype), (3, 4, 4, 4))
            records.append(Record(item.key, item.caption, latents, latents[0, 0].repeat(2, axis=1)))
        return records, bad

build_data.Encoder = Slow
root, place = Path(sys.argv[1]), Path(sys.argv[2])
values = {"videos": root / "many", "buckets": "9x32x32", "shard": 2}
config = tiny_config("build_data", root, **{f"build_data__{k}": v for k, v in values.items()})
pipeline = build_data.load_pipeline(root / "pipeline")
build_data.load_pipeline = lambda *_: pipeline

def child(workdir):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        try:
            build_data.run(config, workdir)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def reports():
    return len(list((place / "b").glob("data/reports/0*.json")))

assert os.waitstatus_to_exitcode(os.waitpid(child(place / "a"), 0)[1]) == 0
rng, stopped = random.Random(0), []
for _ in range(2):
    before, pid = reports(), child(place / "b")
    while reports() == before:  # one more shard is whole
        time.sleep(0.002)
    time.sleep(0.1 * rng.random())  # a shard takes 0.08 s and more
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stopped.append(reports())
assert os.waitstatus_to_exitcode(os.waitpid(child(place / "b"), 0)[1]) == 0
there = files(place / "b")
print(json.dumps({"stopped": stopped, "same": files(place / "a") == there, "files": len(there)}))
"""


def test_killed_at_random_moments_gives_the_same_files(root, tmp_path):
    (root / "many").mkdir()
    for i in range(8):
        (root / "many" / f"{i:02d}.mp4").symlink_to(root / "videos" / ("torn.mp4" if i == 5 else "a.mp4"))
        (root / "many" / f"{i:02d}.txt").write_text(f"number {i}")
    here = Path(__file__).parent
    arguments = [str(root), str(tmp_path), str(here), str(here.parent)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(here.parents[1]), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["same"] and told["files"] == 4 + 4 + 7  # shards, reports, and seven others
    assert 0 < told["stopped"][0] < 4, told
