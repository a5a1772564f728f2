"""Built sets are what TensorFlow Datasets reads, and the same bytes however often building was interrupted."""

import csv
import json
import sys

import latent_sets
import numpy as np
import pytest
import tensorflow_datasets as tfds

from hybrid_dit.data.shards import Record, ShardFolder
from hybrid_dit.errors import UserError

PAIRS = latent_sets.samples(7, ((3, 4, 6), (1, 6, 4)))
KEYS = [f'vidéo {i}, "b".mp4' for i in range(7)]


def records(numbers):
    return [Record(KEYS[i], f"prompt {i}", *PAIRS[i]) for i in numbers]


def begin(folder, keys=KEYS, dtype="bfloat16"):
    return ShardFolder(folder, keys, 3, latent_sets.CHANNELS, latent_sets.WIDTH, dtype)


def test_tfds_reads_what_was_written_without_tensorflow(tmp_path):
    made = begin(tmp_path)
    assert made.shards == 3 and [list(made.items(n)) for n in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    made.write(0, records([0, 1]), {KEYS[2]: 'too short, says "he"'})
    made.write(1, [], {KEYS[3]: "gone", KEYS[4]: "gone", KEYS[5]: "gone"})
    made.write(2, records([6]), {})
    told = made.finish({"early": "no caption"}, fps=16)
    assert told == {"samples": 3, "skipped": 5, "fps": 16}
    source = tfds.builder_from_directory(tmp_path).as_data_source(split="train")
    assert len(source) == 3 and "tensorflow" not in sys.modules
    for row, i in zip(source, (0, 1, 6)):
        assert row["key"].decode() == KEYS[i] and row["prompt"].decode() == f"prompt {i}"
        for name, expected in zip(("latents", "text"), PAIRS[i]):
            assert row[name].dtype == expected.dtype and row[name].tobytes() == expected.tobytes()
    with open(tmp_path / "skipped.csv", newline="") as lines:
        table = list(csv.reader(lines))
    assert table[0] == ["file", "reason"] and [KEYS[2], 'too short, says "he"'] in table and len(table) == 6
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 3 and [len(s["samples"]) for s in manifest["shards"]] == [2, 0, 1]
    assert manifest["shards"][2]["samples"] == [[KEYS[6], [3, 4, 6], len(PAIRS[6][1])]]


def test_float32_is_kept(tmp_path):
    made = begin(tmp_path, KEYS[:1], "float32")
    latents, text = (x.astype(np.float32) for x in PAIRS[0])
    made.write(0, [Record(KEYS[0], "", latents, text)], {})
    made.finish({})
    (row,) = tfds.builder_from_directory(tmp_path).as_data_source(split="train")
    assert row["latents"].dtype == np.float32 and row["latents"].tobytes() == latents.tobytes()


def test_what_is_left_to_do_is_known_and_leftovers_vanish(tmp_path):
    made = begin(tmp_path)
    assert made.missing() == [0, 1, 2]
    made.write(1, records([3, 4, 5]), {})
    for name in (".latents-train.array_record-00000-of-00003.incomplete", "reports/.partial-0.json"):
        (tmp_path / name).write_text("cut off")  # what processes that were killed leave
    again = begin(tmp_path)
    assert again.missing() == [0, 2]
    again.write(0, records([0, 1, 2]), {})
    again.write(2, records([6]), {})
    again.finish({})
    names = {path.name for path in tmp_path.rglob("*")}
    assert not [name for name in names if "partial" in name or "incomplete" in name]


def test_other_videos_are_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(UserError, match=r"was begun with other videos or captions \(7 then, 6 now\)"):
        begin(tmp_path, KEYS[:6])


def test_a_set_without_samples_is_an_error_that_says_why(tmp_path):
    made = begin(tmp_path, KEYS[:1])
    made.write(0, [], {KEYS[0]: "too short"})
    with pytest.raises(UserError, match=r"none of 1 videos could be used; see (.*\n)+.*too short"):
        made.finish({})
    assert not (tmp_path / "manifest.json").exists() and (tmp_path / "skipped.csv").is_file()
