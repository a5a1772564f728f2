"""JSON from elsewhere: what is read, and what is refused without harm."""

import os

import pytest

from hybrid_dit.convert.json_file import parse_object, read_json, shown
from hybrid_dit.errors import UserError


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"é": [1, 2.5, null, {"b": {}}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None, {"b": {}}]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the name b occurs twice"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"{" + b" " * 2000 + b"}", "has 2,002 bytes; at most 2,000"),
    ],
)
def test_what_is_no_object_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(tmp_path / "a.json", 2000) if b"  " in content else read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(error.value) and len(str(error.value)) < 500


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, message in {"pipe": "not a file", "none": "is missing", ".": "not a file"}.items():
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name)


def test_values_of_files_are_shown_on_one_short_line():
    assert shown("blocks.0.é") == "blocks.0.é"
    assert shown("a\nb\x1b[31m\ud800") == r"'a\nb\x1b[31m\ud800'"
    assert len(shown("x" * 10_000)) == 120 and shown([1, 2]) == "[1, 2]"
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "something deeply nested"


def test_errors_start_with_where(tmp_path):
    with pytest.raises(UserError, match="^x.json: line 3 is not valid JSON"):
        parse_object(b"?", "x.json: line 3")
