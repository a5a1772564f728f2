import json

import pytest

from hybrid_dit.atomic import atomic_path, write_json, write_text


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
