"""A report in a real browser: headless Chromium draws it, and is hovered, zoomed and clicked as by a hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from made_runs import make_run
from parablock.report.write import write_report

TIMEOUT_S = 60
MOST_BYTES = 5_000_000

Browser = webdriver.Chrome


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "Chromium is missing: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; CI must not skip the tests in a browser")
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        *("--window-size=1280,1000", f"--user-data-dir={profile}"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driven = webdriver.Chrome(options=options, service=Service(driver))
    driven.set_script_timeout(TIMEOUT_S)
    yield driven
    driven.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "large", num_rounds=100, num_clients=20, num_blocks=12)
    make_run(folder / "overlapped")
    make_run(folder / "serial", delay=0)
    return folder


@pytest.fixture
def shown(browser: Browser) -> Callable[..., Browser]:
    """Open a report and wait until all is drawn."""

    def show(*directories: Path, scheme: str = "light") -> Browser:
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(write_report(directories).as_uri())
        wait_for(browser, "return document.documentElement.dataset.drawn === 'yes'")
        return browser

    return show


def wait_for(browser: Browser, script: str, *arguments: Any) -> Any:
    return WebDriverWait(browser, TIMEOUT_S, poll_frequency=0.05).until(
        lambda driven: driven.execute_script(script, *arguments)
    )


def gesture(browser: Browser, act: Callable[[], None], script: str, *arguments: Any) -> None:
    """Act until it shows: on a loaded machine two clicks can be too far apart to be a double click."""
    for _ in range(6):
        act()
        try:
            WebDriverWait(browser, TIMEOUT_S / 6, poll_frequency=0.05).until(
                lambda driven: driven.execute_script(script, *arguments)
            )
        except TimeoutException:
            continue
        return
    pytest.fail(f"the page did not answer: {script}")


def figure(browser: Browser, name: str) -> WebElement:
    box = browser.find_element(By.ID, name)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    return box


def axis_range(browser: Browser, name: str) -> list[float]:
    script = "return document.querySelector(`#${arguments[0]} .js-plotly-plot`).layout.xaxis.range"
    return [float(end) for end in browser.execute_script(script, name)]


def num_bars(browser: Browser) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, "#gantt .bars .point"))


def choose(browser: Browser, name: str, choice: str) -> None:
    box = figure(browser, name)
    button = next(b for b in box.find_elements(By.CSS_SELECTOR, ".switch button") if b.text == choice)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"


def drag_across(browser: Browser, name: str) -> None:
    plot = figure(browser, name).find_element(By.CSS_SELECTOR, ".nsewdrag")
    wide = plot.rect["width"]
    actions = ActionChains(browser, duration=50).move_to_element_with_offset(plot, round(-0.25 * wide), 0)
    actions.click_and_hold().move_by_offset(round(0.2 * wide), 0).move_by_offset(round(0.2 * wide), 0)
    actions.release().perform()


def requests(browser: Browser) -> list[str]:
    """List what the page asked for, itself and what it holds inside left out."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))]


# -- a run of 100 rounds and 20 clients -----------------------------------------------------------------------


def test_a_long_run_of_many_clients_is_drawn_without_errors_or_requests_and_is_small(shown, runs: Path):
    browser = shown(runs / "large")
    assert (runs / "large" / "report.html").stat().st_size < MOST_BYTES
    for name in ("loss", "gantt", "blocks", "clients"):
        size = figure(browser, name).find_element(By.CSS_SELECTOR, ".nsewdrag").size
        assert size["width"] > 300 and size["height"] > 100, name
    assert num_bars(browser) > 20 * 8
    assert requests(browser) == []
    assert browser.get_log("browser") == []


def test_a_request_and_an_error_would_have_been_seen(browser: Browser, tmp_path: Path):
    (tmp_path / "page.html").write_text("<script src='http://127.0.0.1:9/x.js'></script><script>gone()</script>")
    browser.get((tmp_path / "page.html").as_uri())
    assert requests(browser) == ["http://127.0.0.1:9/x.js"]
    assert any("gone is not defined" in entry["message"] for entry in browser.get_log("browser"))


def test_all_rounds_are_a_click_away_and_only_bars_near_the_view_are_drawn(shown, runs: Path):
    browser = shown(runs / "large")
    before, first = num_bars(browser), axis_range(browser, "gantt")
    choose(browser, "gantt", "all rounds")
    wait_for(browser, "return document.querySelectorAll('#gantt .bars .point').length > arguments[0]", 4 * before)
    assert axis_range(browser, "gantt")[1] > 8 * first[1]
    assert num_bars(browser) >= 20 * 100 * 3  # computing, sending and receiving, and what was cut
    choose(browser, "gantt", "first rounds")
    wait_for(browser, "return document.querySelectorAll('#gantt .bars .point').length === arguments[0]", before)
    assert axis_range(browser, "gantt") == first


# -- by hand --------------------------------------------------------------------------------------------------


def test_hovering_a_bar_of_the_timeline_says_what_it_is(shown, runs: Path):
    browser = shown(runs / "overlapped")
    assert browser.find_elements(By.CSS_SELECTOR, "#gantt .hovertext") == []
    figure(browser, "gantt")
    bar = browser.find_elements(By.CSS_SELECTOR, "#gantt .bars .point")[1]
    ActionChains(browser).move_to_element(bar).perform()
    label = wait_for(browser, "return document.querySelector('#gantt .hovertext')?.textContent")
    assert label.startswith("client 1 computing, round 1, block 0")
    assert label.endswith("s, computing")


@pytest.mark.parametrize("name", ["gantt", "loss", "blocks"])
def test_dragging_zooms_in_and_a_double_click_goes_back(shown, runs: Path, name: str):
    browser = shown(runs / "overlapped")
    before = axis_range(browser, name)
    zoomed = (
        "return document.querySelector(`#${arguments[0]} .js-plotly-plot`).layout.xaxis.range[0] > arguments[1]"
    )
    gesture(browser, lambda: drag_across(browser, name), zoomed, name, before[0])
    after = axis_range(browser, name)
    assert before[0] < after[0] < after[1] < before[1]
    plot = figure(browser, name).find_element(By.CSS_SELECTOR, ".nsewdrag")
    back = f"return !({zoomed.removeprefix('return ')})"
    gesture(browser, lambda: ActionChains(browser).double_click(plot).perform(), back, name, before[0])
    assert axis_range(browser, name) == pytest.approx(before)
    assert browser.get_log("browser") == []


def test_the_loss_can_be_seen_over_seconds_and_bytes(shown, runs: Path):
    browser = shown(runs / "overlapped")
    title = "return document.querySelector('#loss .xtitle').textContent === arguments[0]"
    assert axis_range(browser, "loss")[1] < 15
    choose(browser, "loss", "seconds")
    wait_for(browser, title, "seconds")
    assert 24 < axis_range(browser, "loss")[1] < 30  # 12 rounds of 2 s
    choose(browser, "loss", "bytes")
    wait_for(browser, title, "bytes, up and down, all clients")
    assert 1e8 < axis_range(browser, "loss")[1] < 1.2e8
    choose(browser, "loss", "rounds")
    wait_for(browser, title, "round")
    assert axis_range(browser, "loss")[1] < 15


def test_compared_runs_have_a_curve_each_that_a_click_in_the_legend_hides(shown, runs: Path):
    browser = shown(runs / "overlapped", runs / "serial")
    curves = "return document.querySelectorAll('#compared .scatterlayer .trace').length"
    assert browser.execute_script(curves) == 2
    entries = figure(browser, "compared").find_elements(By.CSS_SELECTOR, ".legend .traces")
    (serial,) = (entry for entry in entries if entry.text == "serial")
    ActionChains(browser).move_to_element(serial).click().perform()
    wait_for(browser, f"{curves} === 1")
    assert browser.get_log("browser") == []


# -- looks ----------------------------------------------------------------------------------------------------


def test_dark_and_light_follow_the_system_without_a_reload(shown, runs: Path):
    browser = shown(runs / "overlapped", scheme="dark")
    color = "return getComputedStyle(document.querySelector('#gantt .bars .point path')).fill"
    ground = "return getComputedStyle(document.body).backgroundColor"
    dark, dark_ground = browser.execute_script(color), browser.execute_script(ground)
    media = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    wait_for(browser, f"return (() => {{ {color} }})() !== arguments[0]", dark)
    assert browser.execute_script(ground) != dark_ground


def test_nothing_offers_to_send_a_figure_away(shown, runs: Path):
    browser = shown(runs / "overlapped")
    titles = "return [...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)"
    offered = set(browser.execute_script(titles))
    assert "Download plot as a PNG" in offered
    assert not [title for title in offered if any(word in title for word in ("Share", "Cloud", "Plotly"))]


ANSWERS = [
    {
        "prompt": "How many? " * 30,
        "reference": "#### 9",
        "base": "Ann has 12 apples. " * 9,
        "tuned": "12 - 3\n#### 9",
    },
    {"prompt": "wordwithoutaspace" * 12, "reference": "x", "base": "y" * 200, "tuned": "def f(x):\n    return x"},
]
TOO_WIDE = """
    const limit = document.documentElement.clientWidth + 1, wide = [];
    for (const element of document.body.querySelectorAll('*')) {
        const box = element.getBoundingClientRect();
        let parent = element.parentElement;
        while (parent && getComputedStyle(parent).overflowX === 'visible') parent = parent.parentElement;
        const scrolls = parent && parent !== document.body && parent !== document.documentElement;
        const cut = box.right > limit || (box.left < -1 && box.right > 0);
        if (box.width && box.height && !scrolls && cut)
            wide.push(`${element.tagName} ${element.id} ${Math.round(box.left)} to ${Math.round(box.right)}`);
    }
    return [document.documentElement.scrollWidth - document.documentElement.clientWidth, wide];
"""
BROKEN = """
    const cells = [...document.querySelectorAll('td')].filter((cell) => /^[a-z_]{1,12}$/.test(cell.textContent));
    const rows = (cell) => {
        const range = document.createRange();
        range.selectNodeContents(cell);
        return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
    };
    const broken = cells.filter((cell) => cell.offsetParent && rows(cell) > 1);
    return [cells.length, broken.map((cell) => cell.textContent)];
"""
HOLES = """
    return [...document.querySelectorAll('.facts')].filter((facts) => {
        const end = facts.getBoundingClientRect(), last = facts.lastElementChild.getBoundingClientRect();
        return end.right - last.right > 3 || end.bottom - last.bottom > 3;
    }).length;
"""
LOSS = """
    const cells = [...document.querySelectorAll('.facts dd, td')];
    const box = cells.find((cell) => cell.textContent.includes(arguments[0])).getBoundingClientRect();
    return [box.right, box.bottom];
"""
EDGE = """
    const [picture, done] = arguments, image = new Image();
    image.onload = () => {
        const canvas = document.createElement('canvas'), across = canvas.getContext('2d');
        [canvas.width, canvas.height] = [image.width, image.height];
        across.drawImage(image, 0, 0);
        const red = (x) => across.getImageData(x, image.height - 10, 1, 1).data[0];
        const isShaded = (x) => Math.abs(red(x) - red(image.width / 2)) > 20;
        done([isShaded(4), isShaded(image.width - 5)]);
    };
    image.src = `data:image/png;base64,${picture}`;
"""
EMPTY = "return [...document.querySelectorAll('section')].filter((part) => !part.innerText.trim()).map((p) => p.id)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """Runs whose names, prompts and answers are as long as people's are."""
    folder = tmp_path_factory.mktemp("pages")
    remote = {"engine": {"name": "remote", "clock": "real"}, "num_clients": 2}
    run = make_run(folder / "overlapped")
    deployed = make_run(folder / "a-deployment-with-a-rather-long-name-of-its-own", **remote)
    for directory in (run, deployed):
        (directory / "answers.json").write_text(json.dumps(ANSWERS))
    return {
        "a run": (run,),
        "a comparison": (run, make_run(folder / "serial", delay=0)),
        "a deployment": (deployed,),
    }


@pytest.mark.parametrize("name", ["a run", "a comparison", "a deployment"])
def test_nothing_is_wider_than_the_window_or_empty(
    name: str, shown: Any, browser: Browser, pages: dict[str, tuple[Path, ...]]
):
    try:
        for width in (420, 700, 1000, 1400):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            shown(*pages[name])
            assert browser.execute_script("return window.innerWidth") == width
            assert browser.execute_script(TOO_WIDE) == [0, []], width
            assert browser.execute_script(EMPTY) == [], width
            assert browser.execute_script(HOLES) == 0, width
            if width == 420:
                right, bottom = browser.execute_script(LOSS, " → 1.483" if name != "a comparison" else "1.4826")
                assert right <= width and bottom <= 740, "the loss is not on the first screen of a phone"
            num_words, broken = browser.execute_script(BROKEN)
            assert num_words and broken == [], width
        wider = (
            "document.querySelector('main, body').insertAdjacentHTML('beforeend', '<p style=width:2000px>wide</p>')"
        )
        browser.execute_script(wider)
        assert browser.execute_script(TOO_WIDE)[1], "a paragraph that is too wide would have been seen"
        narrow = "cell.style.cssText = 'display: block; width: 2em; min-width: 0; overflow-wrap: anywhere'"
        browser.execute_script(f"document.querySelectorAll('td').forEach((cell) => {{ {narrow} }})")
        assert browser.execute_script(BROKEN)[1], "a word that is broken would have been seen"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_goes_on_behind_an_edge_is_shaded_there(scheme: str, shown: Any, browser: Browser, runs: Path):
    def shaded(box: WebElement) -> list[bool]:
        edges: list[bool] = browser.execute_async_script(EDGE, box.screenshot_as_base64)
        return edges

    try:
        size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        shown(runs / "overlapped", scheme=scheme)
        boxes = browser.find_elements(By.CSS_SELECTOR, ".table, .use pre")
        wide = "return arguments[0].scrollWidth > arguments[0].clientWidth"
        scrolling = [box for box in boxes if box.is_displayed() and browser.execute_script(wide, box)]
        fitting = [box for box in boxes if box.is_displayed() and box not in scrolling]
        assert {box.tag_name for box in scrolling} == {"div", "pre"} and fitting
        for box in scrolling:
            assert shaded(box) == [False, True]
            browser.execute_script("arguments[0].scrollLeft = arguments[0].scrollWidth", box)
            assert shaded(box) == [True, False]
        assert [shaded(box) for box in fitting] == [[False, False]] * len(fitting)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
