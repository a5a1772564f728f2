"""The page in headless Chromium. Slow, since installing the browser takes longer than a test may."""

import json
import time

import numpy as np
import pytest
from browser import chromium
from example import FRAMES, PROMPTS, example

from hybrid_dit.report import MAX_BYTES, write_report
from hybrid_dit.report.films import VARIANTS
from hybrid_dit.video_io import write_mp4

pytestmark = pytest.mark.slow
FPS = 16


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_report(example(tmp_path_factory.mktemp("run")))[0].as_uri()


@pytest.fixture
def page(browser, address):
    browser.emulate(1100, 900)
    browser.open("about:blank")
    browser.requested(), browser.log("browser")
    browser.open(address)
    wait(browser, "return [...document.querySelectorAll('video')].every((v) => v.readyState > 1)")
    yield browser
    assert browser.log("browser") == []


def wait(browser, condition, seconds=10):
    end = time.monotonic() + seconds
    while not browser.run(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.05)


def times(browser):
    return browser.run("return [...document.querySelectorAll('video')].map((v) => v.currentTime)")


def where(browser):
    return browser.run("return document.querySelector('.where').textContent")


def click(browser, selector):
    browser.run("document.querySelector(arguments[0]).click()", selector)


def focused(browser):
    return browser.run(
        "const e = document.activeElement; return [e.tagName.toLowerCase(), e.className.baseVal ?? e.className]"
    )


def test_it_opens_in_two_seconds_without_a_fetch_and_without_running_a_prompt(page, address):
    seconds = page.run("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    assert 0 < seconds < 2
    others = [url for url in page.requested() if not url.startswith("data:")]
    assert others == [address]
    assert page.run("return document.scripts.length") == 1  # an alert would have failed everything


def test_one_of_nearly_the_greatest_size_opens_in_two_seconds_too(browser, tmp_path):
    """Videos of noise, which does not compress."""
    noise = np.random.default_rng(0)
    for file in example(tmp_path).glob("evaluate/videos/*/*.mp4"):
        write_mp4(file, noise.integers(0, 256, (115, 112, 112, 3), np.uint8))
    path, notes = write_report(tmp_path)
    assert 12e6 < path.stat().st_size <= MAX_BYTES and not notes
    browser.open(path.as_uri())
    seconds = browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    print(f"{path.stat().st_size / 1e6:.1f} MB in {seconds:.2f} s")
    assert 0 < seconds < 2


def test_no_prompt_can_fetch_or_run_anything(browser, address):
    browser.open(address)
    browser.requested()
    browser.run(
        """const image = new Image(); image.src = "http://localhost:9/x.png"; document.body.append(image);
        const script = document.createElement("script"); script.textContent = "window.ran = true";
        document.body.append(script);"""
    )
    time.sleep(0.3)
    assert browser.run("return window.ran === undefined")
    assert len([entry for entry in browser.log("browser") if "Content Security Policy" in entry["message"]]) == 2


def test_videos_are_decoded_and_play_in_step(page):
    sizes = page.run("return [...document.querySelectorAll('video')].map((v) => v.videoWidth)")
    assert sizes == [16] * len(VARIANTS) * PROMPTS
    page.emulate(1100, 2000)  # all on screen
    page.run("document.querySelector('#videos').scrollIntoView({behavior: 'instant'})")
    page.run("document.querySelector('.speed').value = '0.25'")  # nine frames are over soon
    click(page, ".play")
    spreads, seen = [], set()
    for _ in range(40):
        moment = page.run(
            """const on = [...document.querySelectorAll("video")].filter((v) => !v.paused && !v.seeking);
            return [on.map((v) => v.currentTime), document.querySelector(".where").textContent];"""
        )
        if len(moment[0]) == len(VARIANTS) * PROMPTS:
            spreads.append(max(moment[0]) - min(moment[0]))
            seen.add(moment[1])
        time.sleep(0.03)
    assert len(spreads) > 20 and len(seen) > 4
    assert max(spreads) < 1 / FPS  # less than a frame apart
    # One that falls behind is brought back, before the loop would do so.
    page.run("const s = document.querySelector('.scrub'); s.value = 3; s.dispatchEvent(new Event('input'))")
    click(page, ".play")
    wait(page, "return [...document.querySelectorAll('video')].every((v) => !v.paused && !v.seeking)")
    page.run("document.querySelectorAll('video')[3].currentTime = 0")
    together = "const t = [...document.querySelectorAll('video')].map((v) => v.currentTime); "
    wait(page, f"{together} return Math.max(...t) - Math.min(...t) < {1 / FPS}", seconds=0.8)
    assert min(times(page)) > 3 / FPS
    click(page, ".play")
    assert page.run("return document.querySelector('.play').textContent") == "Play"
    wait(page, "return [...document.querySelectorAll('video')].every((v) => v.paused && !v.seeking)")
    assert len(set(times(page))) == 1


def test_only_what_is_on_screen_plays_and_the_rest_joins_in_step(page):
    moving = "return [...document.querySelectorAll('video')].map((v) => !v.paused)"
    page.emulate(360, 400)
    page.run("document.querySelector('.speed').value = '0.25'")
    page.run("document.querySelector('#commands').scrollIntoView({behavior: 'instant'})")
    click(page, ".play")
    time.sleep(0.3)
    assert not any(page.run(moving))
    page.run("document.querySelectorAll('video')[7].scrollIntoView({behavior: 'instant'})")
    wait(page, moving + "[7]")
    assert not page.run(moving)[0]
    click(page, ".play")


def test_frames_are_stepped_and_scrubbed_to_exactly(page):
    colours = """const v = document.querySelectorAll("video")[0], c = document.createElement("canvas");
        c.width = c.height = 16; const d = c.getContext("2d"); d.drawImage(v, 0, 0);
        return d.getImageData(8, 8, 1, 1).data[0];"""
    for step in range(1, FRAMES):
        click(page, ".forward")
        wait(page, "return [...document.querySelectorAll('video')].every((v) => !v.seeking)")
        assert where(page) == f"frame {step + 1} of {FRAMES}"
        assert times(page) == pytest.approx([(step + 0.5) / FPS] * len(VARIANTS) * PROMPTS, abs=1e-3)
        # Red grows by 25 a frame in the example; half of that tells neighbours apart.
        assert page.run(colours) == pytest.approx(25 * step, abs=12)
    click(page, ".forward")
    assert where(page) == f"frame {FRAMES} of {FRAMES}"
    page.run("const s = document.querySelector('.scrub'); s.value = 3; s.dispatchEvent(new Event('input'))")
    assert where(page) == f"frame 4 of {FRAMES}"
    click(page, ".back")
    assert times(page) == pytest.approx([2.5 / FPS] * len(VARIANTS) * PROMPTS, abs=1e-3)
    assert page.run("return document.querySelector('.scrub').getAttribute('aria-valuetext')") == (
        f"frame 3 of {FRAMES}, 0.13 seconds"
    )


def test_without_loop_it_stops_at_the_last_frame_and_starts_over(page):
    page.run("document.querySelector('.loop').checked = false")
    click(page, ".play")
    wait(page, "return document.querySelector('.play').textContent === 'Play'")
    assert where(page) == f"frame {FRAMES} of {FRAMES}"
    page.run("document.querySelector('.speed').value = '0.25'")
    click(page, ".play")
    wait(page, "return Number(document.querySelector('.scrub').value) < 6")


def test_everything_is_reached_and_worked_by_keyboard(page):
    page.press("tab")
    assert focused(page) == ["a", "skip"]
    page.press("enter")
    reached = []
    for _ in range(60):
        page.press("tab")
        element = focused(page)
        reached.append(element[1].split(" ")[0] or element[0])
        if element[1] == "play":
            page.press("space")
            wait(page, "return document.querySelector('.play').textContent === 'Pause'")
            page.press("space")
        if element[1] == "scrub":
            page.run("document.querySelector('.scrub').value = 0")
            page.press("right", "right")
            assert where(page) == f"frame 3 of {FRAMES}"
        if element[1].startswith("point"):
            first = page.run("return document.querySelector('.readout').textContent")
            page.press("right")
            assert page.run("return document.querySelector('.readout').textContent") != first
            assert page.run("return document.activeElement.getAttribute('aria-label')") == page.run(
                "return document.querySelector('.readout').textContent"
            )
            page.press("end")
            outlined = page.run("return getComputedStyle(document.activeElement.querySelector('path')).strokeWidth")
            assert outlined == "4px"  # focus is visible
        if element[0] == "body":
            break
    controls = ["play", "back", "forward", "scrub", "speed", "loop"]
    assert [name for name in reached if name in controls] == controls
    assert reached.count("point") == 1 and reached.count("summary") >= 4 and "scroll" in reached


def test_nothing_but_tables_is_wider_than_a_phone(page):
    page.emulate(360, 740)
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.run("return document.documentElement.scrollWidth") == 360
    wide = page.run(
        """return [...document.querySelectorAll("body *")].filter((e) =>
            !e.closest(".scroll") && e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 99))"""
    )
    assert wide == []
    small = page.run(
        """return [...document.querySelectorAll("button, select, .scrub")].filter((e) =>
            e.getBoundingClientRect().height < 24).length"""  # WCAG 2.2, target size
    )
    assert small == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colour_scheme(page, scheme):
    page.emulate(1100, 900, prefers_color_scheme=scheme)
    ground, ink = page.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    dark = {
        name: sum(json.loads(f"[{c.removeprefix('rgb(').rstrip(')')}]")) < 384
        for name, c in (("ground", ground), ("ink", ink))
    }
    assert dark == {"ground": scheme == "dark", "ink": scheme == "light"}


def test_with_reduced_motion_nothing_loops_or_glides(browser, address):
    browser.emulate(1100, 900, prefers_reduced_motion="reduce")
    browser.open(address)
    assert browser.run("return document.querySelector('.loop').checked") is False
    assert browser.run("return getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert browser.run("return [...document.querySelectorAll('video')].every((v) => v.paused && !v.autoplay)")


def test_a_video_refused_as_data_is_tried_as_a_blob_then_explained(page):
    page.run("document.querySelector('video').dispatchEvent(new Event('error'))")
    wait(page, "const v = document.querySelector('video'); return v.src.startsWith('blob:') && v.readyState > 1")
    click(page, ".forward")
    wait(page, "return !document.querySelector('video').seeking")
    assert times(page)[0] == pytest.approx(1.5 / FPS, abs=1e-3)
    page.run("document.querySelector('video').dispatchEvent(new Event('error'))")
    assert "can't play H.264" in page.run("return document.querySelector('.films .failed').textContent")
