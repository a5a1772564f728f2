"""Reads a page with html.parser and refuses what is not well formed."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "img", "br", "hr"}
PHRASING = {"a", "b", "button", "code", "input", "label", "option", "path", "select", "span", "svg", "text"}
PARENTS = {  # element -> where it may be
    "li": {"ul", "ol"},
    "tr": {"thead", "tbody"},
    "td": {"tr"},
    "th": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "caption": {"table"},
    "summary": {"details"},
    "figcaption": {"figure"},
    "option": {"select"},
    "path": {"svg", "g"},
}


class Outline(HTMLParser):
    """The elements of a page.

    Attributes:
        elements: (name, attributes, names of ancestors, text inside as a list that grows) in the page's order.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {[name for name, *_ in self._open]}"

    def handle_starttag(self, tag, attrs):
        ancestors = [name for name, *_ in self._open]
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        if tag in PARENTS:
            assert ancestors[-1] in PARENTS[tag], f"<{tag}> in <{ancestors[-1]}>"
        if {"p", "button", "label", "h1", "h2", "h3"} & set(ancestors):
            assert tag in PHRASING, f"<{tag}> inside {ancestors}"
        element = (tag, dict(attrs), ancestors, [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes <{self._open[-1][0]}>"
        self._open.pop()

    def handle_data(self, data):
        for *_, text in self._open:
            text.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def find(self, name: str, **attributes: str) -> list[tuple[dict, str]]:
        """Returns (attributes, text) of all elements of this name that have these attributes (class: one of them)."""
        found = []
        for tag, attrs, _, text in self.elements:
            wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
            if tag == name and all(value in (attrs.get(key) or "").split() for key, value in wanted.items()):
                found.append((attrs, "".join(text)))
        return found

    def section(self, anchor: str) -> str:
        """Returns the text of a section."""
        [(_, text)] = self.find("section", id=anchor)
        return text
