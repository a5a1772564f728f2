import json
import os

import pytest

from hybrid_dit.data.captions import find_videos
from hybrid_dit.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "sub/a.MOV", "c.webm"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "videos"


def test_captions_beside_the_videos(folder):
    (folder / "b.txt").write_text("\ufeff a dog \n", encoding="utf-8")
    (folder / "sub" / "a.txt").write_text("日本", encoding="utf-8")
    (folder / "notes.txt").write_text("of no video")
    found, skipped = find_videos(folder)
    assert [(v.key, v.caption, v.path) for v in found] == [
        ("b.mp4", "a dog", folder / "b.mp4"),
        ("sub/a.MOV", "日本", folder / "sub" / "a.MOV"),
    ]
    assert skipped == {"c.webm": "there is no caption c.txt beside it"}


def test_unreadable_and_empty_captions_are_told(folder):
    (folder / "b.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "c.txt").write_text("  \n")
    (folder / "sub" / "a.txt").write_text("good")
    found, skipped = find_videos(folder)
    assert [v.key for v in found] == ["sub/a.MOV"]
    assert skipped["b.mp4"].startswith("its caption b.txt can't be read")
    assert skipped["c.webm"] == "its caption is empty"


def test_names_and_captions_that_can_not_be_written_are_told(folder):
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt", b"no\xe9.mp4", b"sub/a.txt"):
        (folder / os.fsdecode(name)).write_bytes(b"good")
    (folder / "c.txt").write_text("good")
    found, skipped = find_videos(folder)
    assert [v.key for v in found] == ["c.webm", "sub/a.MOV"]
    assert skipped == {
        "caf\\udce9.mp4": "its name or caption is not UTF-8; change it",
        "no\\udce9.mp4": "there is no caption no\\udce9.txt beside it",
        "b.mp4": "there is no caption b.txt beside it",
    }
    table = folder.parent / "captions.jsonl"
    rows = [{"file": "b.mp4", "caption": "half a \ud800"}, {"file": "\ud800.mp4", "caption": "a"}]
    table.write_text("\n".join(map(json.dumps, [*rows, {"file": "c.webm", "caption": "b"}])))
    found, skipped = find_videos(folder, table)
    assert [v.key for v in found] == ["c.webm"] and skipped.keys() == {"b.mp4", "\\ud800.mp4"}


ROWS = [("b.mp4", "one, with a comma"), ("sub/a.MOV", "two"), ("gone.mp4", "x"), ("../b.mp4", "x")]
ROWS += [("/etc/passwd", "x"), ("b.mp4", "again"), ("c.webm", ""), ("", "x")]


@pytest.mark.parametrize("columns", [("file", "caption"), ("file_name", "text"), ("video", "prompt")])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_captions_in_a_table(folder, ending, columns):
    table = folder.parent / f"captions.{ending}"
    if ending == "csv":
        table.write_text("".join(f'{a},"{b}"\n' for a, b in [columns, *ROWS]))
    else:
        table.write_text("\n".join(json.dumps(dict(zip(columns, row))) for row in ROWS) + "\n\n")
    found, skipped = find_videos(folder, table)
    assert [(v.key, v.caption) for v in found] == ROWS[:2]
    assert skipped == {
        "gone.mp4": "there is no such file",
        "../b.mp4": "its name leads out of the folder",
        "/etc/passwd": "its name leads out of the folder",
        "b.mp4": "it is listed more than once; the first caption was taken",
        "c.webm": "its caption is empty",
        "(no name)": "its name leads out of the folder",
    }


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"name,words\nb.mp4,x\n", "need a column file or .*found .*name.*words"),
        ("a.csv", b"", "found no rows"),
        ("a.csv", b"\xff\xfe", "not UTF-8 CSV or JSONL"),
        ("a.jsonl", b'{"file": "b.mp4", ', "not UTF-8 CSV or JSONL"),
        ("a.jsonl", b"[1]\n", "found no rows"),
        ("missing.csv", None, "can't be read: No such file"),
    ],
)
def test_a_table_that_can_not_be_used_is_told(folder, name, content, message):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_videos(folder, folder / name)


def test_no_folder_and_no_captions_are_told(folder):
    with pytest.raises(UserError, match="there is no folder"):
        find_videos(folder / "nowhere")
    with pytest.raises(UserError, match=r"no video with a caption(.*\n)+  b.mp4: there is no caption b.txt"):
        find_videos(folder)
