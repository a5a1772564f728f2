import pytest

from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError


def test_one_prompt_a_line_without_blanks(tmp_path):
    (tmp_path / "p.txt").write_bytes("  a cat \r\n\n\t\na dog, 一只狗".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog, 一只狗"]


def test_other_breaks_are_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("a cat\u2028in\x0bthe\x85sun\r\na dog".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cat\u2028in\x0bthe\x85sun", "a dog"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa cat\n")
    assert read_prompts(tmp_path / "p.txt") == ["a cat"]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "has no prompt in it"), (b" \n\n", "has no prompt in it"), (b"a \xff\n", "is not UTF-8 text")],
)
def test_files_without_prompts(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"p.txt {message}"):
        read_prompts(tmp_path / "p.txt")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(UserError, match="--config.prompts.train"):
        read_prompts("")
