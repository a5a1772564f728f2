"""HTML and SVG that are safe by construction: text is escaped unless it was made here."""

import html
from collections.abc import Iterable

VOID = frozenset({"meta", "link", "input", "img", "br", "hr"})  # HTML elements without an end tag


class Html(str):
    """Markup that needs no escaping."""

    __slots__ = ()


def tag(name_: str, /, *children: object, **attributes: object) -> Html:
    """Returns an element.

    Args:
        name_: of the element; positional, as `name` is an attribute, too.
        *children: `Html` as it is, None nothing, lists their items, all else as escaped text.
        **attributes: names with a final underscore stripped and others as hyphens (`class_`, `aria_label`); None and
            False leave the attribute out, True gives it without a value.
    """
    parts = [name_]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = "<" + " ".join(parts) + ">"
    return Html(opening if name_ in VOID else f"{opening}{join(children)}</{name_}>")


def join(children: Iterable[object]) -> Html:
    """Returns the children of an element one after another, see `tag`."""
    return Html("".join(map(_markup, children)))


def _markup(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, list | tuple):
        return join(child)
    return html.escape(str(child))
