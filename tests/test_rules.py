import pytest

from hybrid_dit import rules
from hybrid_dit.errors import UserError


def test_each_path_gets_the_value_of_the_one_rule_that_matches_all_of_it():
    got = rules.assign([("a/.*", 1), ("b", 2)], ["a/x", "b"], "test")
    assert got == {"a/x": 1, "b": 2}
    with pytest.raises(ValueError, match="parameter bb matches 0 test rules; expected exactly one"):
        rules.assign([("b", 2)], ["bb"], "test")
    with pytest.raises(ValueError, match="parameter b matches 2 test rules"):
        rules.assign([("b", 2), (".*", 2)], ["b"], "test")


def test_numbers_are_read_after_the_last_equals_sign():
    assert rules.parse_numbers(["a=b/.*=0.5", "c=0"], "key") == [("a=b/.*", 0.5), ("c", 0.0)]


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=-1", "a=nan", "a=inf", "a(=1", "a=x"])
def test_what_is_no_rule_is_told(text):
    with pytest.raises(UserError, match=r"--config.some.key: can't read the rule .*REGEX=NUMBER"):
        rules.parse_numbers([text], "some.key")


def test_the_structure_keeps_empty_subtrees():
    assert rules.like({"a": {"b": 0}, "c": {}}, {"a/b": 1}) == {"a": {"b": 1}, "c": {}}
