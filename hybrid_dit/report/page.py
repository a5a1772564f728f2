"""One self-contained page about a surgery: everything inline, nothing fetched, whatever the workdir holds so far."""

import base64
import hashlib
from pathlib import Path

from hybrid_dit.atomic import write_text
from hybrid_dit.errors import UserError
from hybrid_dit.report import films, sections
from hybrid_dit.report.contents import STAGES, Contents, read
from hybrid_dit.report.markup import Html, join, tag
from hybrid_dit.report.settings import compare, load_defaults

NAME = "report.html"
MAX_BYTES = 15_000_000
LEAST = 1_000_000  # a page without videos stays below this for the largest models
MARGIN = 100_000  # for what surrounds the videos: captions and notes


def write_report(workdir: Path, max_bytes: int = MAX_BYTES) -> tuple[Path, list[str]]:
    """Writes `report.html` about what `workdir` holds, atomically; the same files give the same bytes.

    Args:
        workdir: of a surgery, complete or not.
        max_bytes: of the page; videos are shrunk or left out beyond it, and the page says so.

    Returns:
        The file, and a sentence about everything that could not be shown.

    Raises:
        UserError: it holds no stage of a surgery, or `max_bytes` is too small for a page.
    """
    check_size(max_bytes)
    contents = read(workdir)
    rest = len(render(contents, films.Films((), ())).encode())
    room = max(0, max_bytes - rest - MARGIN) * 3 // 4  # base64 makes 4 bytes of 3
    shown = films.embed(films.find(workdir / "evaluate" / "videos"), room)
    path = workdir / NAME
    write_text(path, render(contents, shown))
    return path, [*contents.problems, *shown.notes]


def check_size(max_bytes: int) -> None:
    """Raises UserError if a page of `max_bytes` is too small."""
    if max_bytes < LEAST:
        raise UserError(f"a report needs at least {LEAST / 1e6:g} MB, got {max_bytes / 1e6:g}; raise report.max_mb")


def is_current(workdir: Path) -> bool:
    """Whether there is a report that is younger than every finished stage."""
    path = workdir / NAME
    if not path.is_file():
        return False
    marks = [workdir / stage / "done.json" for stage in STAGES]
    return path.stat().st_mtime_ns >= max((mark.stat().st_mtime_ns for mark in marks if mark.is_file()), default=0)


def render(contents: Contents, shown: films.Films) -> Html:
    """Returns the page."""
    settings = compare(contents.settings, load_defaults())
    has_videos = shown.rows or shown.notes
    front = sections.pareto(contents.front, contents.chosen, contents.rates) if contents.front else None
    parts = {  # title -> (stage it comes from, content)
        "Summary": ("evaluate", sections.summary(contents.results) if contents.results else None),
        "Videos": ("evaluate", sections.videos(shown, contents.results) if has_videos else None),
        "Rate of every block": ("select", sections.rate_map(contents) if contents.chosen else None),
        "Errors": ("distill", sections.heat_map(contents.errors, contents.chosen) if contents.errors else None),
        "Pareto front": ("select", front),
        "Training": ("distill", sections.losses(contents)),
        "Environment": ("distill", sections.environment(contents)),
        "Settings": ("distill", sections.configuration(settings)),
        "Commands": ("distill", sections.reproduce(contents, settings)),
    }
    links, blocks = [], []
    for title, (stage, content) in parts.items():
        anchor = title.lower().replace(" ", "-")
        missing = sections.absent(contents, stage)
        links.append(tag("li", tag("a", title, href=f"#{anchor}")))
        heading = tag("h2", title, id=f"{anchor}-title")
        blocks.append(tag("section", heading, content or missing, id=anchor, aria_labelledby=f"{anchor}-title"))
    title = f"Attention Surgery: {contents.workdir.resolve().name}"
    nav = tag("nav", tag("ul", links), aria_label="Sections")
    header = tag("header", tag("h1", title), sections.verdict(contents), nav)
    footer = tag("footer", tag("p", f"Made by hybrid_dit from the files in {contents.workdir}; nothing is fetched."))
    skip = tag("a", "Skip to the results", href="#main", class_="skip")
    body = tag("body", skip, header, tag("main", blocks, id="main", tabindex=-1), footer, _script())
    return join([Html("<!DOCTYPE html>\n"), tag("html", _head(title), body, lang="en"), Html("\n")])


def _head(title: str) -> Html:
    # Nothing may be fetched, and no script but ours may run, whatever a prompt says.
    digest = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", _asset("page.css")),
    )


def _script() -> Html:
    return tag("script", _asset("page.js"))


def _asset(name: str) -> Html:
    return Html((Path(__file__).parent / name).read_text(encoding="utf-8"))
