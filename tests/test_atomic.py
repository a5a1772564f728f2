import json
import os

import pytest

from hybrid_dit.atomic import atomic_path, staged_folder, write_json, write_text
from hybrid_dit.errors import UserError


def test_a_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent and temporary.suffix == ".txt"  # same disk; formats go by the ending
    assert target.read_text() == "half"
    assert list(target.parent.iterdir()) == [target]


def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("fails", [False, True])
def test_folders_are_replaced_as_a_whole(tmp_path, fails):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("1")
    try:
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / "new").write_text("2")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [path.name for path in target.iterdir()] == ["old" if fails else "new"]
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "file.txt"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the last to finish
    assert list(tmp_path.iterdir()) == [target]


def test_json_is_utf_8_and_reads_back(tmp_path):
    value = {"prompt": "ein roter Kreis, 红", "numbers": [1, 0.1, None]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    assert "红" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_staged_folder_appears_when_complete(tmp_path):
    with staged_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(UserError, match="out exists; remove it"), staged_folder(tmp_path / "out"):
        pass


def test_a_staged_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as temporary:
        (temporary / "a").mkdir()
        1 / 0  # noqa: B018
    assert not os.listdir(tmp_path)


def test_the_next_try_clears_what_a_killed_one_left(tmp_path):
    stale = tmp_path / ".out.incomplete" / "deep"
    stale.mkdir(parents=True)
    (stale / "half").write_text("")
    with staged_folder(tmp_path / "out") as temporary:
        assert not os.listdir(temporary)
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers_of_one_folder_are_told(tmp_path):
    with staged_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
        with pytest.raises(UserError, match="another process is writing"), staged_folder(tmp_path / "out"):
            pass
        assert (temporary / "a").exists()  # the first one's work is left alone
    assert (tmp_path / "out" / "a").exists()
