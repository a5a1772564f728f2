"""Layouts against what the suites' own code looks for, written out here from its description."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_dit.errors import UserError
from hybrid_dit.vbench import layout
from hybrid_dit.vbench.facts import VBENCH, VBENCH2
from hybrid_dit.video_io import write_mp4

CLOWN = "a clown fish swimming"
LONG = ("A dragon slept for a very long time " * 10).strip()
VBENCH_INFO = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": CLOWN, "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "The bund Shanghai", "dimension": ["appearance_style"], "auxiliary_info": {}},
    {"prompt_en": "The bund Shanghai", "dimension": ["appearance_style"], "auxiliary_info": {}},  # VBench has two such
]
VBENCH2_INFO = [
    {"prompt_en": "A man is playing.", "dimension": ["Diversity"]},
    {"prompt_en": LONG, "dimension": ["Complex_Plot"]},
    {"prompt_en": "A man is playing.", "dimension": ["Human_Anatomy"]},
]


def section(path, info, **values):
    (path / "info.json").write_text(json.dumps(info))
    defaults = {
        "name": "vbench",
        "prompts": str(path / "info.json"),
        "rewritten": "",
        "originals": "",
        "dimensions": (),
    }
    return ConfigDict(defaults | values)


def files(videos):
    return [file for video in videos for file in video.files]


def test_vbench_is_flat_with_25_of_temporal_flickering(tmp_path):
    videos = layout.videos_of(section(tmp_path, VBENCH_INFO))
    counts = {"In a still frame, a stop sign": 25, CLOWN: 5, "The bund Shanghai": 5}
    assert files(videos) == [f"{prompt}-{i}.mp4" for prompt, count in counts.items() for i in range(count)]
    assert all(video.prompt == video.name for video in videos)


def test_vbench2_has_folders_short_names_and_20_of_diversity(tmp_path):
    videos = layout.videos_of(section(tmp_path, VBENCH2_INFO, name="vbench2"))
    expected = {
        f"{entry['dimension'][0]}/{entry['prompt_en'][:180]}-{i}.mp4"
        for entry in VBENCH2_INFO
        for i in range(20 if entry["dimension"] == ["Diversity"] else 3)
    }
    assert len(files(videos)) == len(set(files(videos))) and set(files(videos)) == expected
    assert len(videos) == 20 + 3  # the video that two dimensions ask for is made once
    assert videos[0].files == ("Diversity/A man is playing.-0.mp4", "Human_Anatomy/A man is playing.-0.mp4")


def test_the_full_suites_have_their_published_numbers_of_videos():
    """946 prompts of VBench (2 of them twice) give 6,220 videos; 1,230 of VBench-2.0 give 3,860."""
    kinds = {"temporal_flickering": 75, "human_action": 869}
    prompts = [layout.SuitePrompt(f"{name} {i}", (name,)) for name, count in kinds.items() for i in range(count)]
    prompts += prompts[-2:]
    videos = layout.layout(VBENCH, prompts, [p.text for p in prompts])
    assert len(prompts) == 946 and len(files(videos)) == len(set(files(videos))) == 6220
    kinds = {"Diversity": 10, "Mechanics": 1220}
    prompts = [layout.SuitePrompt(f"{name} {i}", (name,)) for name, count in kinds.items() for i in range(count)]
    assert len(files(layout.layout(VBENCH2, prompts, [p.text for p in prompts]))) == 3860


def test_lists_and_folders_of_lists_are_suites_too(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "temporal_flickering.txt").write_text("still\n")
    (tmp_path / "lists" / "scene.txt").write_text("alley\nbar\n")
    assert layout.read_suite(VBENCH, tmp_path / "lists") == [
        ("alley", ("scene",)),
        ("bar", ("scene",)),
        ("still", ("temporal_flickering",)),
    ]
    plain = tmp_path / "all.txt"
    plain.write_bytes("still\r\nan alley\u2028at night\n".encode())  # only \\n ends a line
    prompts = layout.read_suite(VBENCH, plain)
    assert prompts == [("still", ()), ("an alley\u2028at night", ())]
    assert len(layout.layout(VBENCH, prompts, ["", ""])) == 10
    with pytest.raises(UserError, match="needs to know every prompt's dimension"):
        layout.read_suite(VBENCH2, plain)


def test_rewritten_prompts_keep_the_names_of_the_originals(tmp_path):
    augmented = tmp_path / "augmented.txt"
    augmented.write_text("\n".join(["sign!", "fish!", "bund!", "another bund!"]))
    videos = layout.videos_of(section(tmp_path, VBENCH_INFO, rewritten=str(augmented)))
    assert files(videos) == files(layout.videos_of(section(tmp_path, VBENCH_INFO)))
    assert {(v.name, v.prompt) for v in videos} == {
        ("In a still frame, a stop sign", "sign!"),
        (CLOWN, "fish!"),
        ("The bund Shanghai", "bund!"),  # the first of the two, as of the videos
    }
    augmented.write_text("one\n")
    with pytest.raises(UserError, match="has 1 lines, but the suite has 4 prompts"):
        layout.videos_of(section(tmp_path, VBENCH_INFO, rewritten=str(augmented)))


def test_rewritten_prompts_may_follow_another_list(tmp_path):
    (tmp_path / "full.txt").write_text(f"A man is playing.\n{LONG}\n")
    (tmp_path / "aug.txt").write_text("man!\ndragon!\n")
    values = {"name": "vbench2", "rewritten": str(tmp_path / "aug.txt"), "originals": str(tmp_path / "full.txt")}
    videos = layout.videos_of(section(tmp_path, VBENCH2_INFO, **values))
    assert {v.prompt for v in videos} == {"man!", "dragon!"} and len(videos) == 23
    (tmp_path / "full.txt").write_text("A man is playing.\nsomething else\n")
    with pytest.raises(UserError, match="no line for 1 prompts of the suite, such as 'A dragon"):
        layout.videos_of(section(tmp_path, VBENCH2_INFO, **values))


def test_a_folder_rewrites_every_dimension_by_itself(tmp_path):
    for name, lines in (("Diversity", "man 1"), ("Complex_Plot", "dragon"), ("Human_Anatomy", "man 2")):
        (tmp_path / f"{name}.txt").write_text(lines)
    videos = layout.videos_of(section(tmp_path, VBENCH2_INFO, name="vbench2", rewritten=str(tmp_path)))
    texts = {file: video.prompt for video in videos for file in video.files}
    assert texts["Diversity/A man is playing.-0.mp4"] == "man 1"
    assert texts["Human_Anatomy/A man is playing.-0.mp4"] == "man 2"
    assert len(videos) == 26


def test_some_dimensions_only(tmp_path):
    videos = layout.videos_of(section(tmp_path, VBENCH_INFO, dimensions=("imaging_quality",)))
    assert files(videos) == [f"{CLOWN}-{i}.mp4" for i in range(5)]
    with pytest.raises(UserError, match="VBench has no dimension 'image_quality'"):
        layout.videos_of(section(tmp_path, VBENCH_INFO, dimensions=("image_quality",)))


@pytest.mark.parametrize(
    "info, message",
    [
        ([{"prompt_en": "a/b", "dimension": ["scene"]}], "has a slash"),
        ([{"prompt_en": "é" * 130, "dimension": ["scene"]}], "more than 255 bytes"),
        ([{"prompt_en": "x", "dimension": ["Diversity"]}], "one of VBench-2.0's .--config.suite.name=vbench2"),
        ([], "no prompt in it"),
        ({"a": 1}, "not a suite's full_info.json"),
        ([{"prompt": "x"}], "KeyError: 'prompt_en'"),
    ],
)
def test_unfit_suites_are_refused(tmp_path, info, message):
    with pytest.raises(UserError, match=message):
        layout.videos_of(section(tmp_path, info))


def test_other_mistakes_are_refused(tmp_path):
    with pytest.raises(UserError, match="suite.name='vbench3' is unknown"):
        layout.videos_of(section(tmp_path, VBENCH_INFO, name="vbench3"))
    with pytest.raises(UserError, match="no prompts of the suite given"):
        layout.videos_of(section(tmp_path, VBENCH_INFO, prompts=""))
    with pytest.raises(UserError, match="No such file"):
        layout.videos_of(section(tmp_path, VBENCH_INFO, prompts=str(tmp_path / "no.json")))
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        layout.videos_of(section(tmp_path, VBENCH_INFO, prompts=str(tmp_path / "gap.txt")))
    same = [layout.SuitePrompt("x" * 180 + end, ("Mechanics",)) for end in "ab"]
    with pytest.raises(UserError, match="two prompts would both be called Mechanics/x"):
        layout.layout(VBENCH2, same, ["", ""])


def test_shares_cover_everything_once():
    videos = [layout.Video("", "", i, ()) for i in range(11)]
    shares = [layout.of_share(videos, f"{k}/4") for k in range(4)]
    assert sorted(v.index for share in shares for v in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert layout.of_share(videos, "0/1") == videos
    for share in ("4/4", "-1/4", "1", "a/b", "1/2/3"):
        with pytest.raises(UserError, match="must be NUMBER/PROCESSES"):
            layout.of_share(videos, share)


def test_what_is_missing_broken_or_stray_is_told(tmp_path):
    videos = layout.videos_of(section(tmp_path, VBENCH_INFO))
    some = layout.videos_of(section(tmp_path, VBENCH_INFO, dimensions=("appearance_style",)))
    folder = tmp_path / "videos"
    write_mp4(folder / "whole.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    content = (folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    for file in files(videos):
        (folder / file).write_bytes(content)
    assert layout.check(folder, videos).complete
    assert str(layout.check(folder, videos)) == "35 of 35 videos"
    assert layout.check(folder, some, videos).complete  # others of the suite are not stray
    assert len(layout.check(folder, some).stray) == 30
    (folder / f"{CLOWN}-3.mp4").unlink()
    (folder / f"{CLOWN}-4.mp4").write_bytes(content[:-1])
    (folder / f"{CLOWN}-2.mp4").write_bytes(b"")
    (folder / ".partial.mp4").write_bytes(content)
    found = layout.check(folder, videos)
    assert found == (35, [f"{CLOWN}-3.mp4"], [f"{CLOWN}-2.mp4", f"{CLOWN}-4.mp4"], [".partial.mp4"])
    assert not found.complete
    assert str(found).startswith(f"32 of 35 videos, missing: '{CLOWN}-3.mp4', broken: '")
    (folder / f"{CLOWN}-3.mp4").mkdir()  # no video
    (folder / f"{CLOWN}-4.mp4").unlink()
    (folder / f"{CLOWN}-4.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / ".ipynb_checkpoints").mkdir()
    found = layout.check(folder, videos)
    strays = [".ipynb_checkpoints", ".partial.mp4", f"{CLOWN}-3.mp4"]
    assert found == (35, [f"{CLOWN}-3.mp4", f"{CLOWN}-4.mp4"], [f"{CLOWN}-2.mp4"], strays)
    empty = layout.check(tmp_path / "nowhere", videos)
    assert len(empty.missing) == 35 and str(empty).endswith("and 30 more")


@pytest.mark.parametrize("cut", [0, 7, 20, 100])
def test_a_cut_off_file_is_no_mp4(tmp_path, cut):
    path = tmp_path / "a.mp4"
    write_mp4(path, np.zeros((2, 16, 16, 3), np.uint8))
    content = path.read_bytes()
    assert layout.is_whole_mp4(path)
    path.write_bytes(content[:cut])
    assert not layout.is_whole_mp4(path)
    path.write_bytes(content[: len(content) - cut - 1])
    assert not layout.is_whole_mp4(path)
    path.write_bytes(b"\0" * 100)
    assert not layout.is_whole_mp4(path)
