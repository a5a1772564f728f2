"""The sections of a report, each a function of what the workdir holds; None where there is nothing to show."""

import base64
import json
from collections.abc import Mapping, Sequence

import numpy as np

from hybrid_dit.loss_log import running_mean
from hybrid_dit.report import charts
from hybrid_dit.report.contents import Choice, Contents, Errors, Front, Interval, Results
from hybrid_dit.report.films import Clip, Films, Row
from hybrid_dit.report.markup import Html, tag
from hybrid_dit.report.settings import Settings, commands

AVERAGED = 10  # losses of fine-tuning in a running mean


def verdict(contents: Contents) -> Html:
    """Says in a sentence or two what surgery cost and saved, and what is missing."""
    sentences = []
    rows = {row.name: row for row in contents.results.variants} if contents.results else {}
    if "teacher" in rows and "finetuned" in rows:
        teacher, hybrid = rows["teacher"], rows["finetuned"]
        if teacher.score and hybrid.score:
            sentences.append(f"The hybrid scores {_mean(hybrid.score)}, the teacher {_mean(teacher.score)} (of 100).")
        elif hybrid.psnr:
            sentences.append(f"The hybrid's videos are within {_mean(hybrid.psnr, ' dB')} PSNR of the teacher's.")
        sentences.append(
            f"It saves {hybrid.saved:.1%} of the attention FLOPs; a video takes {hybrid.denoise:.2f} s to denoise "
            f"instead of {teacher.denoise:.2f} s."
        )
    lines = [tag("p", " ".join(sentences), class_="verdict")] if sentences else []
    open_stages = [f"{stage} ({status})" for stage, status in contents.status.items() if status != "complete"]
    if open_stages:
        lines.append(tag("p", f"Not in this report yet: {', '.join(open_stages)}.", class_="note"))
    lines += [tag("p", f"{problem}.", class_="note") for problem in contents.problems]
    return tag("div", lines)


def summary(results: Results) -> Html:
    """The table of all variants, and one of the score's parts."""
    columns: dict[str, list[str]] = {
        "score": [_mean(row.score) for row in results.variants],
        "minus teacher": ["" if row.name == "teacher" else _mean(row.minus_teacher) for row in results.variants],
        "PSNR to teacher": [_mean(row.psnr, " dB") for row in results.variants],
        "denoise": [f"{row.denoise:.2f} s" for row in results.variants],
        "decode": [f"{row.decode:.2f} s" for row in results.variants],
        "attention FLOPs": [f"{row.flops:.3g}" for row in results.variants],
        "saved": [f"{row.saved:.1%}" for row in results.variants],
    }
    shown = [name for name, cells in columns.items() if any(cells)]  # no scores, no column
    body = [[row.name, *(columns[name][i] for name in shown)] for i, row in enumerate(results.variants)]
    parts = [
        tag("p", f"{results.about}. Seconds and FLOPs are per video; [low, high] is the 95% bootstrap interval."),
        table(["variant", *shown], body, "Summary of all variants"),
    ]
    names = list(dict.fromkeys(part for row in results.variants for part in row.parts))
    if names:
        cells = [[row.name, *(_number(row.parts.get(part)) for part in names)] for row in results.variants]
        inner = table(["variant", *names], cells, "Parts of the score")
        parts.append(tag("details", tag("summary", "Parts of the score"), inner))
    compared = [row for row in results.variants if row.ssim or row.motion or row.velocity]
    if compared:
        times = list(dict.fromkeys(time for row in compared for time in row.velocity))
        cells = [
            [row.name, _mean(row.ssim, digits=3), _percent(row.motion)]
            + [_mean(row.velocity.get(time), digits=2) for time in times]
            for row in compared
        ]
        head = ["variant", "SSIM", "motion", *(f"t = {time:g}" for time in times)]
        text = (
            "SSIM to the teacher's videos; motion as a share of theirs; and at timesteps t the relative L1 distance of "
            "the velocity from the teacher's, both given the same noisy latents."
        )
        inner = tag("p", text), table(head, cells, "Likeness to the teacher")
        parts.append(tag("details", tag("summary", "Likeness to the teacher"), *inner))
    return tag("div", parts)


def rate_map(contents: Contents) -> Html:
    """The chosen rate of every block, and the best model with one rate for the same budget."""
    text = f"{charts.describe(contents.chosen)}; attention FLOPs saved {contents.chosen.saved:.1%}"
    parts = [tag("p", f"Budget {contents.budget}: {text}.")]
    parts.append(_blocks(contents.chosen, contents.rates, "Chosen rates of the blocks"))
    if contents.homogeneous:
        parts.append(tag("h3", "One rate only, same budget"))
        parts.append(tag("p", f"For comparison: {charts.describe(contents.homogeneous)}."))
        parts.append(_blocks(contents.homogeneous, contents.rates, "Rates of the blocks with one rate only"))
    return tag("div", parts)


def heat_map(errors: Errors, chosen: Choice | None) -> Html:
    """Blocks as rows, rates as columns, chosen cells framed; and all numbers."""
    top = max(cell[1] for cell in errors.cells.values()) or 1.0
    body, numbers = [], []
    for block in range(errors.blocks):
        cells = [tag("th", block, scope="row")]
        for rate in errors.rates:
            undistilled, distilled, low, high = errors.cells[block, rate]
            picked = chosen is not None and len(chosen.blocks) > block and chosen.blocks[block] == rate
            text = [f"{distilled:.3f}", tag("span", " chosen", class_="unseen") if picked else None]
            heat = f"--heat:{max(distilled, 0) / top:.3f}"
            cells.append(tag("td", text, style=heat, class_="picked" if picked else None))
            numbers.append([block, rate, f"{undistilled:.4f}", f"{distilled:.4f}", f"[{low:.4f}, {high:.4f}]"])
        body.append(tag("tr", cells))
    head = tag("tr", tag("th", "block", scope="col"), [tag("th", rate, scope="col") for rate in errors.rates])
    caption = tag("caption", "Relative L1 error of each block's attention on held-out prompts", class_="unseen")
    grid = tag("table", caption, tag("thead", head), tag("tbody", body), class_="heat")
    every = table(["block", "rate", "undistilled", "distilled", "95% interval"], numbers, "Errors with intervals")
    text = (
        "Relative L1 error of each block's attention after distillation, held-out prompts: the stronger the colour, "
        "the further from softmax. Framed is the chosen rate; a block without a frame keeps softmax."
    )
    return tag(
        "div",
        tag("p", text),
        _scroll(grid, "Error heat map"),
        tag("details", tag("summary", "Before distillation, and intervals"), every),
    )


def pareto(front: Front, chosen: Choice | None, rates: Sequence[str]) -> Html:
    """The front as a picture and as a table."""
    shown = charts.thin(front.efficient, chosen)
    rows = [["efficient", f"{c.share:.1%}", f"{c.error:.4f}", f"{c.saved:.1%}", " ".join(c.blocks)] for c in shown]
    rows += [
        [name, f"{c.share:.1%}", f"{c.error:.4f}", f"{c.saved:.1%}", " ".join(c.blocks)]
        for name, c in front.homogeneous.items()
    ]
    left = len(front.efficient) - len(shown)
    more = f" ({left} efficient ones more in select/pareto.csv)" if left else ""
    head = ["choice", "cost", "error", "FLOPs saved", "rates of the blocks"]
    numbers = table(head, rows, "Error against cost, all points")
    text = "The smallest sum of block errors that a budget can buy, by the exact knapsack, and models with one rate."
    return tag(
        "div",
        tag("p", text),
        charts.pareto_chart(front, chosen, rates),
        tag("details", tag("summary", f"All points as a table{more}"), numbers),
    )


def absent(contents: Contents, stage: str) -> Html:
    """Says that something of a stage can't be shown, and why."""
    status = contents.status[stage]
    why = "has no such file, or a broken one" if status == "complete" else f"is {status}"
    return tag("p", f"Not available: the stage {stage} {why}.", class_="note")


def losses(contents: Contents) -> Html:
    """Training curves of stages 1 and 3."""
    parts = [tag("h3", "Distillation")]
    if contents.distill_loss:
        steps = range(1, 1 + len(next(iter(contents.distill_loss.values()))))
        width = max(len(steps) // 100, 1)  # a picture has no room for every step of a long run
        curves = {rate: (steps, _smooth(values, width)) for rate, values in contents.distill_loss.items()}
        label = "relative L1 error, mean over blocks" + (f" and {width} steps" if width > 1 else "")
        classes = [charts.rate_class(rate, contents.rates) for rate in curves]
        chart = charts.line_chart(curves, "Distillation", label, classes)
        parts.append(chart)
    else:
        parts.append(absent(contents, "distill"))
    parts.append(tag("h3", "Fine-tuning"))
    if contents.finetune_loss and contents.finetune_loss[0]:
        steps, values = contents.finetune_loss
        curves = {"each step": (steps, values), f"mean of {AVERAGED}": (steps, _smooth(values, AVERAGED))}
        parts.append(charts.line_chart(curves, "Fine-tuning", "flow-matching loss"))
    else:
        parts.append(absent(contents, "finetune"))
    return tag("div", parts)


def videos(films: Films, results: Results | None) -> Html:
    """All variants of every prompt side by side, with one set of controls (`page.js`); without scripts, one each."""
    clips = [clip for row in films.rows for clip in row.clips.values()]
    parts = [tag("p", note, class_="note") for note in films.notes]
    if not clips:
        return tag("div", parts)
    longest = max(clips, key=lambda clip: clip.frames / clip.fps)
    scores = {row.name: row.each for row in results.variants} if results else {}
    about = {"data_fps": f"{longest.fps:g}", "data_frames": longest.frames}
    parts.append(_controls(longest.frames))
    parts += [_film_row(row, scores) for row in films.rows]
    return tag("div", parts, class_="player", **about)


def environment(contents: Contents) -> Html:
    """Versions and devices of every stage, stages that agree in one column."""
    groups: dict[str, list[str]] = {}
    for stage, about in contents.environment.items():
        groups.setdefault(json.dumps(about, sort_keys=True), []).append(stage)
    parts = []
    if groups:
        abouts = [json.loads(text) for text in groups]
        names = list(dict.fromkeys(name for about in contents.environment.values() for name in about))
        rows = [[name, *(about.get(name, "") for about in abouts)] for name in names]
        parts.append(
            table(["", *(", ".join(stages) for stages in groups.values())], rows, "Versions and devices", "words")
        )
    unknown = [s for s, status in contents.status.items() if status == "complete" and s not in contents.environment]
    if unknown:
        parts.append(tag("p", f"Not recorded for: {', '.join(unknown)}."))
    if contents.results:
        parts.append(tag("p", f"Evaluation: {contents.results.about}."))
    if not parts:
        text = "Not available: versions and devices are recorded when a stage is complete."
        parts.append(tag("p", text, class_="note"))
    return tag("div", parts)


def configuration(settings: Settings) -> Html:
    """Settings that were changed, then all of them by section."""
    parts, model = [], " or ".join(settings.models)
    if not settings.values:
        parts.append(tag("p", "Not available: no stage has settings that can be read.", class_="note"))
    elif not model:
        parts.append(tag("p", "The defaults are not at hand (no configs folder beside the package)."))
    elif settings.changed:
        rows = [[key, _shown(value), _shown(default)] for key, (default, value) in settings.changed.items()]
        inner = table(["setting", "here", f"default of {model}"], rows, "Changed settings", "words")
        title = tag("summary", f"Changed from the defaults of {model}: {len(rows)}")
        parts.append(tag("details", title, inner, open=True))
    else:
        parts.append(tag("p", f"All settings are the defaults of {model}."))
    if settings.unknown:
        parts.append(tag("p", f"Not settings of this version: {', '.join(settings.unknown)}.", class_="note"))
    sections: dict[str, list[list[str]]] = {}
    for key, value in settings.values.items():
        sections.setdefault(key.rpartition(".")[0] or "run", []).append([key, _shown(value)])
    for section, rows in sections.items():
        inner = table(["setting", "value"], rows, f"Settings of {section}", "words")
        parts.append(tag("details", tag("summary", f"All of {section} ({len(rows)})"), inner))
    return tag("div", parts)


def reproduce(contents: Contents, settings: Settings) -> Html:
    """Commands that make the run, and this page, again."""
    make, report = commands(settings, contents.workdir)
    return tag(
        "div",
        tag("p", "The run (the same command continues an interrupted one; use another --workdir to start anew):"),
        tag("pre", tag("code", make)),
        tag("p", "This page:"),
        tag("pre", tag("code", report)),
    )


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str, class_: str = "numbers") -> Html:
    """A table whose first column names the rows; it scrolls sideways in its own box. Cells of class "words" wrap."""
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    top = tag("tr", [tag("th", cell, scope="col") if cell else tag("td") for cell in head])
    title = tag("caption", caption, class_="unseen")
    inner = tag("table", title, tag("thead", top), tag("tbody", body), class_=class_)
    return _scroll(inner, caption)


def _scroll(inner: Html, label: str) -> Html:
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex=0)


def _blocks(choice: Choice, rates: Sequence[str], label: str) -> Html:
    items = []
    for block, rate in enumerate(choice.blocks):
        cls = charts.rate_class(rate, rates)
        items.append(tag("li", tag("span", f"block {block} "), tag("b", rate), class_=cls))
    return tag("ol", items, class_="rates", aria_label=label)


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean; after a value that isn't finite nothing is (and nothing is drawn)."""
    return running_mean(np.array(values, np.float64), width).tolist()


def _controls(frames: int) -> Html:
    ends = {"min": 0, "max": max(frames - 1, 0), "value": 0, "step": 1}
    scrub = tag("input", type="range", **ends, aria_label="Frame", class_="scrub")
    speeds = [tag("option", f"{speed:g} x", value=f"{speed:g}", selected=speed == 1) for speed in (0.25, 0.5, 1, 2)]
    return tag(
        "div",
        tag("button", "Play", type="button", class_="play"),
        tag("button", "\N{MINUS SIGN}1", type="button", class_="back", aria_label="Previous frame"),
        tag("button", "+1", type="button", class_="forward", aria_label="Next frame"),
        scrub,
        tag("span", f"frame 1 of {frames}", class_="where"),
        tag("label", "Speed ", tag("select", speeds, class_="speed")),
        tag("label", tag("input", type="checkbox", class_="loop", checked=True), " Loop"),
        class_="controls",
        role="group",
        aria_label="Controls of all videos",
        hidden=True,
    )


def _film_row(row: Row, scores: Mapping[str, Sequence[float]]) -> Html:
    figures = []
    for name, clip in row.clips.items():
        each = scores.get(name, ())
        score = f", score {each[row.index]:.1f}" if row.index < len(each) else ""
        figures.append(tag("figure", _video(clip, f"{name}: {row.prompt}"), tag("figcaption", f"{name}{score}")))
    return tag("div", tag("h3", row.prompt), tag("div", figures, class_="films"))


def _video(clip: Clip, label: str) -> Html:
    data = f"data:video/mp4;base64,{base64.b64encode(clip.data).decode()}"
    size = {"width": clip.width, "height": clip.height}
    flags = {"controls": True, "muted": True, "loop": True, "playsinline": True}
    return tag("video", src=data, preload="metadata", aria_label=label, **size, **flags)


def _mean(interval: Interval | None, unit: str = "", digits: int = 1) -> str:
    if interval is None:
        return ""
    known = interval.low is not None and interval.high is not None
    ends = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if known else ""
    return f"{interval.mean:.{digits}f}{unit}{ends}"


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = (None if x is None else 100 * x for x in (interval.low, interval.high))
    return _mean(Interval(100 * interval.mean, low, high), "%", digits=0)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
