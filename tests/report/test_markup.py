import pytest
from outline import Outline

from hybrid_dit.report.markup import Html, join, tag

NASTY = "<b a='1' b=\"2\">&amp;</b>"


def test_text_and_attributes_are_escaped_and_come_back_from_a_parser():
    [(attributes, text)] = Outline(tag("p", NASTY, title=NASTY)).find("p")
    assert (attributes, text) == ({"title": NASTY}, NASTY)


def test_markup_is_kept_whether_alone_or_in_lists():
    inner = tag("b", "x & y")
    assert tag("p", inner, [inner, (inner,)], None) == f"<p>{inner * 3}</p>"
    assert join([inner, "<"]) == f"{inner}&lt;"


@pytest.mark.parametrize("mixed", [Html("<b>") + NASTY, f"{Html('<b>')}", Html("<b>").lower()])
def test_text_made_of_markup_is_text_again(mixed):
    [(_, text)] = Outline(tag("p", mixed)).find("p")
    assert text == mixed


def test_attributes_without_value_void_elements_and_names():
    assert tag("input", class_="a", aria_label="b", hidden=True, checked=False, title=None) == (
        '<input class="a" aria-label="b" hidden>'
    )
    assert tag("meta", name="x") == '<meta name="x">'
    assert tag("td", 0) == "<td>0</td>" and tag("td", tabindex=0) == '<td tabindex="0"></td>'
