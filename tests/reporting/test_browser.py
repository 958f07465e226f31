"""The page in a real Chromium without a window: nothing is logged or fetched, the controls work, it fits a phone, and
a million lines open fast.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import report
from pipeline.reporting.serve import Pages, Server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[browser]'")
OLD_RUNS = Path(__file__).parents[1] / "old_runs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and its chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run with pictures, and that run beside another one, as pages."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [folder / "first", folder / "second <b>"]
    for number, run in enumerate(runs):
        shutil.copytree(OLD_RUNS / "nvae", run)
        (run / "samples").mkdir()
        for step in (4, 8):
            pixels = np.full((40, 60, 3), 25 * step + number, np.uint8)
            Image.fromarray(pixels).save(run / "samples" / f"step_{step:08d}_temperature_1.png")
    assert report.main([str(runs[0]), "--out", str(folder / "one.html")]) == 0
    assert report.main([*map(str, runs), "--out", str(folder / "two.html")]) == 0
    return folder


def open_page(browser, path: Path, width: int = 1280) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"


def requests(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "file:"))]


def element(browser, selector: str):
    return browser.find_element("css selector", selector)


def elements(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


@pytest.mark.parametrize("name", ["one.html", "two.html"])
@pytest.mark.parametrize("width", [1280, 375])
def test_nothing_is_logged_or_fetched_and_the_page_fits(browser, pages, name, width):
    open_page(browser, pages / name, width)
    assert browser.get_log("browser") == []
    assert requests(browser) == []
    assert len(elements(browser, ".charts canvas")) >= 10
    assert len(elements(browser, "#maps canvas")) == 2 * (1 + (name == "two.html"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_slider_shows_the_pictures_of_a_step(browser, pages):
    open_page(browser, pages / "one.html")
    slider, image = element(browser, "#step"), element(browser, "#gallery img")
    newest = image.get_attribute("src")
    assert (element(browser, "output[for=step]").text, image.get_attribute("naturalWidth")) == ("8", "60")
    slider.send_keys("\ue012")  # arrow to the left
    assert element(browser, "output[for=step]").text == "4"
    assert "step 4" in element(browser, "#gallery figcaption").text
    assert image.get_attribute("src") != newest


def first_chart(browser) -> str:
    """A picture of the first chart, when it is drawn."""
    time.sleep(0.2)
    return element(browser, ".charts canvas").screenshot_as_base64


def test_the_legend_hides_a_run_and_shows_it_again(browser, pages):
    open_page(browser, pages / "two.html")
    both = first_chart(browser)
    chip = elements(browser, ".chip")[1]
    assert chip.text == "second <b>"
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert len(elements(browser, "[data-section=Objective] .card:first-child .readout strong")) == 1
    one = first_chart(browser)
    assert one != both
    assert [block.is_displayed() for block in elements(browser, "#gallery [data-run]")] == [True, False]
    chip.click()
    assert first_chart(browser) == both


def test_zoom_smoothing_and_log_scale_redraw_the_curves(browser, pages):
    open_page(browser, pages / "one.html")
    seen = [first_chart(browser)]
    elements(browser, ".ranges button")[1].click()
    seen.append(first_chart(browser))
    elements(browser, ".ranges button")[0].click()
    assert first_chart(browser) == seen[0]
    element(browser, "#log").click()
    seen.append(first_chart(browser))
    logged = text_of(browser, "#curves .readout")
    element(browser, "#smoothing").send_keys("\ue010")  # to its end
    assert text_of(browser, "#curves .readout") == logged
    seen.append(first_chart(browser))
    assert len(set(seen)) == 4
    chart, whole_run = element(browser, ".charts .u-over"), elements(browser, ".ranges button")[0]
    webdriver.ActionChains(browser).drag_and_drop_by_offset(chart, 60, 0).perform()
    assert whole_run.get_attribute("aria-pressed") == "false"
    webdriver.ActionChains(browser).double_click(chart).move_to_element(element(browser, "#curves h2")).perform()
    assert whole_run.get_attribute("aria-pressed") == "true"
    assert first_chart(browser) == seen[-1]
    assert browser.get_log("browser") == []


def test_the_theme_follows_the_system_and_the_button(browser, pages):
    background = "return getComputedStyle(document.body).backgroundColor"
    backgrounds = []
    for theme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": theme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        open_page(browser, pages / "one.html")
        browser.execute_script("localStorage.clear()")
        open_page(browser, pages / "one.html")
        backgrounds.append(browser.execute_script(background))
    element(browser, "#theme").click()
    assert len(set(backgrounds)) == 2
    assert browser.execute_script(background) == backgrounds[0]
    open_page(browser, pages / "one.html")
    assert browser.execute_script(background) == backgrounds[0], "the choice is kept"
    browser.execute_script("localStorage.clear()")


def test_a_million_lines_open_in_five_seconds(browser, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1_000_000, 2))
    values[654_321, 0] = 99.0
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, (loss, bound) in enumerate(values.tolist()):
            file.write(f'{{"step": {step}, "time": 1.0, "train/loss": {loss}, "train/elbo": {bound}, "kl/a": 1.0}}\n')
    assert report.main([str(tmp_path), "--out", str(tmp_path / "long.html")]) == 0
    assert (tmp_path / "long.html").stat().st_size < 3_000_000
    start = time.monotonic()
    open_page(browser, tmp_path / "long.html")
    assert element(browser, ".charts canvas").is_displayed()
    assert time.monotonic() - start < 5
    highest = (
        "return Math.max(...JSON.parse(document.getElementById('drawn').textContent).runs[0].curves['train/loss'][1])"
    )
    assert browser.execute_script(highest) == 99


def text_of(browser, selector: str) -> str:
    """Read at once: an element may be replaced at any moment."""
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_a_served_page_shows_news_without_losing_what_was_chosen(browser, pages):
    run = pages / "first"
    with Server(Pages([run], contact_sheet=False), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(server.address)
        element(browser, "#settings summary").send_keys(" ")
        element(browser, "#log").send_keys(" ")
        element(browser, "#step").send_keys("\ue012")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 1000, "time": 1.0, "train/loss": 0.125, "train/elbo": 1.0}) + "\n")
        deadline = time.monotonic() + 30
        while "Step 1,000" not in text_of(browser, "#summary") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "Step 1,000" in text_of(browser, "#summary")
        assert "0.125" in text_of(browser, "[data-section=Objective] .card:first-child .readout")
        assert element(browser, "#settings details").get_attribute("open") == "true"
        assert element(browser, "#log").is_selected()
        assert element(browser, "output[for=step]").text == "4"
        assert browser.get_log("browser") == []
        server.shutdown()


def write_metrics(folder: Path, records: list[dict]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1e9, **record}) + "\n" for record in records))
    return folder


ROWS_OF_THE_LINE = """
const canvas = document.querySelector(".charts canvas"), probe = document.querySelector(".charts .dot");
const [red, green, blue] = getComputedStyle(probe).backgroundColor.match(/[0-9]+/g).map(Number);
const left = Math.round(canvas.width / 2);
const { data, width } = canvas.getContext("2d").getImageData(left, 0, canvas.width - left, canvas.height);
const rows = new Set();
for (let i = 0; i < data.length; i += 4)
  if (data[i] === red && data[i + 1] === green && data[i + 2] === blue) rows.add(Math.floor(i / 4 / width));
return rows.size / canvas.height;
"""
"""The share of the first chart's height that its line takes in the right half."""


def test_one_value_far_from_the_others_does_not_flatten_the_curve(browser, tmp_path):
    """Which a chart says; the whole range is one click away."""
    records = [{"step": step, "train/loss": 1e4 if step == 1 else 100.0 + step % 7} for step in range(1, 201)]
    run = write_metrics(tmp_path / "run", records)
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    open_page(browser, tmp_path / "page.html")
    assert text_of(browser, ".charts .outside") == "outside the axis: up to 10K"
    assert browser.execute_script(ROWS_OF_THE_LINE) > 0.5
    element(browser, "#full").click()
    time.sleep(0.2)
    assert text_of(browser, ".charts .outside") == ""
    assert browser.execute_script(ROWS_OF_THE_LINE) < 0.1
    assert browser.get_log("browser") == []


def test_curves_over_the_time_of_training(browser, tmp_path):
    """50 steps of a second, then 50 of three: what was logged after 149 of 200 seconds is of step 83."""
    seconds = {step: min(step, 50) + 3 * max(0, step - 50) for step in range(1, 101)}
    timed = [{"step": step, "train/loss": float(step), "perf/wall_clock_s": at} for step, at in seconds.items()]
    without = [{"step": step, "train/loss": 5.0} for step in range(1, 1001)]
    runs = [write_metrics(tmp_path / "timed", timed), write_metrics(tmp_path / "older", without)]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    open_page(browser, tmp_path / "page.html")
    element(browser, "[data-axis=time]").click()
    assert text_of(browser, "#without") == "Not drawn, as it has no times: older"
    hover_at_three_quarters(browser)
    assert text_of(browser, ".charts .readout") == "149 s83"
    element(browser, "[data-axis=step]").click()
    hover_at_three_quarters(browser)
    assert text_of(browser, ".charts .readout").startswith(("step 74", "step 75"))
    assert browser.get_log("browser") == []


def test_a_series_named_like_a_part_of_the_language_is_a_series(browser, tmp_path):
    named = {"step": 1, "constructor": 1.0, "__proto__": 2.0, "toString": 3.0}
    runs = [write_metrics(tmp_path / "named", [named]), write_metrics(tmp_path / "other", [{"step": 1, "a": 1.0}])]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    open_page(browser, tmp_path / "page.html")
    assert len(elements(browser, ".charts canvas")) == 4
    assert browser.get_log("browser") == []


def test_heat_maps_of_several_runs_share_their_colors_and_steps(browser, tmp_path):
    records = [[{"step": step, "kl/4x4_group00": kl} for step in range(10 * kl)] for kl in (1, 9)]
    runs = [write_metrics(tmp_path / f"run{number}", records[number]) for number in range(2)]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    open_page(browser, tmp_path / "page.html")
    assert [scale.text.split() for scale in elements(browser, "#maps .scale")] == [["0", "9"]] * 2
    assert [axis.text.split()[-1] for axis in elements(browser, "#maps .axis")] == ["89"] * 2


def hover_at_three_quarters(browser) -> None:
    """Of the first chart, from the left."""
    chart = element(browser, ".charts .u-over")
    quarter = chart.size["width"] // 4
    webdriver.ActionChains(browser).move_to_element_with_offset(chart, quarter, 0).perform()
