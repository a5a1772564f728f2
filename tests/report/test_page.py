import base64
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from example import CHOSEN, ERRORS, FRAMES, NASTY, PROMPT, PROMPTS, RATES, example
from outline import Outline

from hybrid_dit.errors import UserError
from hybrid_dit.report import NAME, is_current, page, write_report
from hybrid_dit.report.contents import STAGES
from hybrid_dit.report.films import VARIANTS

CSS = (Path(page.__file__).parent / "page.css").read_text()


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return example(tmp_path_factory.mktemp("root") / "my <run>", select__budget="2R4", finetune__steps=123)


@pytest.fixture(scope="module")
def written(complete):
    path, notes = write_report(complete)
    assert notes == [] and path == complete / NAME
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outline(written):
    return Outline(written)


@pytest.fixture
def workdir(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "run")


def written_from(workdir):
    return Outline(write_report(workdir)[0].read_text(encoding="utf-8"))


def test_the_same_files_give_the_same_bytes_and_nothing_else_is_left(complete, written):
    before = sorted(complete.rglob("*"))
    write_report(complete)
    assert (complete / NAME).read_text(encoding="utf-8") == written and sorted(complete.rglob("*")) == before


def test_texts_of_the_user_are_texts(outline, written):
    assert len(outline.find("script")) == 1 and not outline.find("img")
    assert outline.find("script")[0][1] == (Path(page.__file__).parent / "page.js").read_text()
    assert NASTY in outline.section("summary") and NASTY in outline.section("rate-of-every-block")
    assert json.dumps(NASTY, ensure_ascii=False) in outline.section("settings")
    assert [text for _, text in outline.find("h3")][:PROMPTS] == [PROMPT] * PROMPTS
    assert "Attention Surgery: my <run>" in outline.find("h1")[0][1]
    assert "<b>TPU</b>" in outline.section("environment") and "<b>TPU" not in written


def test_nothing_is_fetched_and_no_other_script_may_run(outline):
    addresses = [
        (name, key, value)
        for name, attributes, *_ in outline.elements
        for key, value in attributes.items()
        if key in ("href", "src", "srcset", "poster", "action", "data", "xlink:href", "formaction", "background")
    ]
    assert len(addresses) > 10
    for name, key, value in addresses:
        assert value.startswith("data:") or (name, key) == ("a", "href") and value.startswith("#"), (
            name,
            key,
            value[:80],
        )
    assert "url(" not in CSS and "@import" not in CSS
    [policy] = [a["content"] for a, _ in outline.find("meta", http_equiv="Content-Security-Policy")]
    digest = base64.b64encode(hashlib.sha256(outline.find("script")[0][1].encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert "http" not in policy and "*" not in policy
    handlers = [key for _, attributes, *_ in outline.elements for key in attributes if key.startswith("on")]
    assert not handlers


def test_links_lead_to_sections_and_ids_are_unique(outline):
    ids = [attributes["id"] for _, attributes, *_ in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes, _ in outline.find("a")]
    assert len(links) == 10 and all(link[1:] in ids for link in links)
    assert all(a["aria-labelledby"] in ids for a, _ in outline.find("section"))


def test_landmarks_headings_and_language(outline):
    assert [a["lang"] for a, _ in outline.find("html")] == ["en"]
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(outline.find(landmark)) == 1, landmark
    levels = [int(name[1]) for name, *_ in outline.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))


def test_every_picture_video_and_control_has_a_name(outline):
    for name, attributes, ancestors, text in outline.elements:
        if name == "video" or attributes.get("role") in ("img", "group", "region"):
            assert attributes["aria-label"].strip()
        elif name == "svg":
            assert attributes.get("aria-hidden") == "true"
        elif name in ("input", "select", "button"):
            assert attributes.get("aria-label") or "label" in ancestors or "".join(text).strip()
    assert len(outline.find("svg", role="img")) == 2 and len(outline.find("svg", role="group")) == 1
    labels = [a["aria-label"] for a, _ in outline.find("video")]
    assert labels == [f"{name}: {PROMPT}" for _ in range(PROMPTS) for name in VARIANTS]


def test_tables_have_captions_and_headers_and_scroll_where_a_keyboard_reaches_them(outline):
    tables = outline.find("table")
    assert len(outline.find("caption")) == len(tables) >= 6
    assert len(outline.find("div", class_="scroll", role="region", tabindex="0")) == len(tables)
    assert all(a.get("scope") in ("row", "col") for a, _ in outline.find("th"))
    heads = [ancestors for name, _, ancestors, _ in outline.elements if name == "th" and "tbody" in ancestors]
    assert len(heads) == len([name for name, _, a, _ in outline.elements if name == "tr" and "tbody" in a])


def test_summary_shows_scores_with_intervals_flops_and_seconds(outline):
    text = outline.section("summary")
    for shown in ("90.0 [80.5, 95.2]", "-3.0 [-6.0, 0.0]", "23.5 dB", "1.00 s", "8e+10", "25.0%", "88.2"):
        assert shown in text
    for shown in ("0.780 [0.500, 0.875]", "125% [50, 150]", "t = 137.5", "0.62 [0.00, 1.00]"):
        assert shown in text
    verdict = outline.find("p", class_="verdict")[0][1]
    assert verdict.startswith("The hybrid scores 87.0 [77.5, 92.2], the teacher 90.0 [80.5, 95.2] (of 100).")
    assert "25.0% of the attention FLOPs" in verdict and "1.00 s to denoise instead of 4.00 s" in verdict


def test_heat_map_has_every_error_as_strong_as_it_is_large_and_frames_the_choice(outline):
    cells = [(a, t) for a, t in outline.find("td") if "--heat" in a.get("style", "")]
    expected = [ERRORS[rate][block] for block in range(3) for rate in RATES]
    assert [float(text.split()[0]) for _, text in cells] == expected
    assert [float(a["style"].split(":")[1]) for a, _ in cells] == pytest.approx([e / 0.6 for e in expected], abs=5e-4)
    picked = [i for i, (a, _) in enumerate(cells) if a.get("class") == "picked"]
    assert picked == [b * 3 + RATES.index(rate) for b, rate in enumerate(CHOSEN) if rate != "softmax"]
    assert all(("chosen" in text) == (i in picked) for i, (_, text) in enumerate(cells))


def test_long_curves_are_means_which_their_axis_says(workdir):
    steps = range(1, 201)
    (workdir / "distill/loss.csv").write_text("step,R2\n" + "".join(f"{s},{1 + s % 2}\n" for s in steps))
    [label, _] = [a["aria-label"] for a, _ in written_from(workdir).find("svg", role="img")]
    assert "mean over blocks and 2 steps" in label and label.endswith("R2 from 2 to 1.5.")


def test_rates_of_all_blocks(outline):
    lists = [text for _, text in outline.find("ol", class_="rates")]
    assert lists == ["block 0 R4block 1 softmaxblock 2 linear", "block 0 R4block 1 R4block 2 softmax"]


def test_videos_are_the_files_with_their_scores_under_one_set_of_controls(outline, complete):
    data = [base64.b64decode(a["src"].removeprefix("data:video/mp4;base64,")) for a, _ in outline.find("video")]
    files = [complete / f"evaluate/videos/{name}/{PROMPT}-{i}.mp4" for i in range(PROMPTS) for name in VARIANTS]
    assert data == [file.read_bytes() for file in files]
    captions = [text for _, text in outline.find("figcaption")]
    assert captions == [
        f"{name}, score {[85.5, 94.5][i] - v:.1f}" for i in range(PROMPTS) for v, name in enumerate(VARIANTS)
    ]
    [(player, _)] = outline.find("div", class_="player")
    assert (player["data-fps"], player["data-frames"]) == ("16", str(FRAMES))
    assert len(outline.find("div", class_="controls")) == 1
    assert [a["max"] for a, _ in outline.find("input", type="range")] == [str(FRAMES - 1)]


def test_changed_settings_come_first_and_commands_repeat_them(outline):
    rows = outline.section("settings")
    assert rows.index("finetune.steps") < rows.index("All of run")
    assert "finetune.steps12340" in rows  # setting, here, default
    commands = [text for _, text in outline.find("code")]
    assert "--config.finetune.steps=123" in commands[0] and "--config.seed=3" in commands[0]
    assert "configs/report.py" in commands[1]


@pytest.mark.parametrize("missing", STAGES)
def test_a_page_without_a_stage_names_it(workdir, missing):
    shutil.rmtree(workdir / missing)
    found = written_from(workdir)
    assert f"Not in this report yet: {missing} (missing)." in "".join(text for _, text in found.find("header"))
    lacking = {
        "distill": ["errors", "training"],
        "finetune": ["training"],
        "select": ["rate-of-every-block", "pareto-front"],
        "evaluate": ["summary", "videos"],
    }
    for _, attributes, *_ in (e for e in found.elements if e[0] == "section"):
        gone = f"Not available: the stage {missing} is missing." in found.section(attributes["id"])
        assert gone == (attributes["id"] in lacking.get(missing, ())), attributes["id"]


@pytest.mark.parametrize("only", STAGES)
def test_a_page_of_one_unfinished_stage_is_a_page(workdir, only):
    for stage in set(STAGES) - {only}:
        shutil.rmtree(workdir / stage)
    (workdir / only / "done.json").unlink()
    (workdir / only / "environment.json").unlink()
    found = written_from(workdir)
    assert f"{only} (not complete)" in found.find("header")[0][1]
    assert "Not available: versions and devices" in found.section("environment") or only == "evaluate"


@pytest.mark.parametrize("file, stage", [("distill/loss.csv", "distill"), ("finetune/metrics.jsonl", "finetune")])
def test_a_curve_that_is_missing_is_named_beside_the_other(workdir, file, stage):
    (workdir / file).unlink()
    found = written_from(workdir)
    assert f"the stage {stage} has no such file" in found.section("training")
    assert len(found.find("figure", class_="chart")) == 2  # the other curve, and the Pareto front


def test_settings_that_are_missing_are_not_called_defaults(workdir):
    for stage in STAGES:
        (workdir / stage / "settings.json").unlink()
    text = written_from(workdir).section("settings")
    assert "no stage has settings" in text and "All settings are the defaults" not in text


def test_results_without_scores_show_likeness_and_no_empty_column(workdir):
    file = workdir / "evaluate/results.json"
    results = json.loads(file.read_text())
    for row in results["variants"].values():
        for key in ("score", "score_minus_teacher", "score_of_each_video", "parts"):
            del row[key]
    file.write_text(json.dumps(results))
    found = written_from(workdir)
    assert "within 23.5 dB PSNR of the teacher's" in found.find("p", class_="verdict")[0][1]
    assert "minus teacher" not in found.section("summary")
    assert [text for _, text in found.find("figcaption")][:2] == ["teacher", "undistilled"]


def test_what_is_broken_or_shrunk_is_said_on_the_page_and_to_the_caller(workdir, monkeypatch):
    (workdir / "select/pareto.json").write_text("{")
    (workdir / f"evaluate/videos/distilled/{PROMPT}-1.mp4").write_bytes(b"")
    path, notes = write_report(workdir)
    assert len(notes) == 2 and notes[0].startswith("select/pareto.json can't be read")
    text = path.read_text()
    assert all(note.rstrip(".") in "".join(t for _, t in Outline(text).find("p", class_="note")) for note in notes)
    assert "select has no such file, or a broken one" in Outline(text).section("pareto-front")
    monkeypatch.setattr(page, "LEAST", 0)
    path, notes = write_report(workdir, max_bytes=1000)
    assert "2 of 2 prompts are left out to keep the page small." in notes
    assert not Outline(path.read_text()).find("video")


def test_the_page_is_no_larger_than_asked_for(workdir, monkeypatch):
    size = write_report(workdir)[0].stat().st_size
    monkeypatch.setattr(page, "LEAST", 0)
    monkeypatch.setattr(page, "MARGIN", 10_000)
    path, notes = write_report(workdir, max_bytes=size - 1000)
    assert path.stat().st_size <= size - 1000 and notes


def test_too_small_a_limit_is_refused(workdir):
    with pytest.raises(UserError, match="needs at least 1 MB, got 0.5; raise report.max_mb"):
        write_report(workdir, 500_000)


def test_a_report_is_current_until_a_stage_finishes_again(workdir):
    (workdir / NAME).unlink(missing_ok=True)
    assert not is_current(workdir)
    path, _ = write_report(workdir)
    assert is_current(workdir)
    mark = workdir / "evaluate/done.json"
    os.utime(mark, ns=(path.stat().st_mtime_ns + 1,) * 2)
    assert not is_current(workdir)


def schemes():
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    parse = [dict(re.findall(r"--([\w-]+): ([^;]+);", block)) for block in (light, dark)]
    return [{name: colour(value) for name, value in scheme.items()} for scheme in parse]


def colour(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)] if text.startswith("#") else list(map(int, text.split()))


def contrast(a, b):
    """WCAG 2.2's ratio of two sRGB colours."""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_wcags_own():
    assert contrast([0] * 3, [255] * 3) == pytest.approx(21) and contrast([119] * 3, [255] * 3) == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_colours_have_contrast_aa(scheme):
    for text in ("ink", "soft", "link"):
        for ground in ("paper", "panel"):
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
    assert contrast(scheme["ink"], scheme["note"]) >= 4.5
    for heat in range(11):
        mixed = [p + (h - p) * heat / 10 for p, h in zip(scheme["paper"], scheme["heat-rgb"])]
        assert contrast(scheme["ink"], mixed) >= 4.5, heat
    for mark in ("line", *(f"s{i}" for i in range(7))):
        assert contrast(scheme[mark], scheme["paper"]) >= 3, mark
