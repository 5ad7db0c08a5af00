"""The page: its markup, and what a browser makes of it."""

import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kd_ranker import api
from tests.reporting import sweeps

FIGURES = 5


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    one = sweeps.write_sweep(folder / "one", weights=(1.0, 10.0))
    two = sweeps.write_sweep(folder / "two", "movielens_100k", seeds=(0, 1))
    with sweeps.without_pictures(with_charts=True):
        return api.report(one, two, output=folder).page


def test_every_dataset_has_its_parts_in_one_page(page):
    text = page.read_text()
    # Vega is there once.
    assert text.count("window.vegaEmbed") == 1
    assert len(text) < 2_000_000
    markup = re.sub(r"(<script)[^>]*>.*?</script>", r"\1>", text, flags=re.DOTALL)
    counts = {
        'class="verdict-sentence"': 2,
        'class="chart"': 2 * FIGURES,
        "How to read it": 2 * FIGURES,
        'class="sortable"': 2 * 6,
        '<details class="table': 2 * 7,
    }
    assert {part: markup.count(part) for part in counts} == counts
    loads = re.findall(r"""(?:src|href|srcset|action|data|poster|url)[=(]["']?([^"')]*)""", markup)
    assert loads
    assert all(load.startswith(("#", "data:")) for load in loads)


def test_what_a_config_says_cannot_break_the_page(tmp_path):
    name = "<script>alert(1)</script>"
    sweep = sweeps.write_sweep(tmp_path, modes=("none",), seeds=(0,), changes={"data.path": name})
    with sweeps.without_pictures():
        text = api.report(sweep, output=tmp_path).page.read_text()
    assert name not in text
    assert "&lt;script&gt;alert(1)" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def loaded(browser, page):
    """The page with its charts drawn, anew: another test may have left it without scripts."""
    browser.get(page.as_uri())
    drawn = "return document.querySelectorAll('.chart svg').length"
    WebDriverWait(browser, 60).until(lambda it: it.execute_script(drawn) == 2 * FIGURES)
    return browser


def test_every_figure_is_drawn_without_an_error_or_a_request(loaded):
    drawn = (
        "return [...document.querySelectorAll('.chart')]"
        ".filter((it) => it.querySelector('.role-mark path[fill], .role-mark path[stroke]')).length"
    )
    assert loaded.execute_script(drawn) == 2 * FIGURES
    # A request would fail, as the browser is offline, and be logged.
    assert [entry for entry in loaded.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("size", [(1300, 900), (390, 844)])
@pytest.mark.parametrize("with_scripts", [True, False])
def test_the_answer_and_both_first_figures_are_on_the_first_screen(
    browser, page, size, with_scripts
):
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not with_scripts})
    try:
        browser.get(page.as_uri())
        for part in (".verdict-sentence", ".sentences", ".waterfall svg"):
            place = browser.find_element(By.CSS_SELECTOR, part).rect
            assert place["x"] >= 0
            assert place["x"] + place["width"] <= width
            assert place["y"] + place["height"] <= height
        # Its plot, with the origin and the margin, lies above its legend.
        plane = browser.find_element(By.CSS_SELECTOR, ".plane svg").rect
        assert plane["y"] + 0.5 * plane["height"] <= height
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def click_on_title(browser, title, press=None):
    """Click on a column's title in the main table; return its header and the column's texts."""
    unfold = "document.querySelectorAll('details.table').forEach((table) => { table.open = true; })"
    browser.execute_script(unfold)
    table = browser.find_elements(By.CSS_SELECTOR, ".results table.sortable")[0]
    headers = table.find_elements(By.CSS_SELECTOR, "th")
    place = [header.text.split(" ↕")[0] for header in headers].index(title)
    button = headers[place].find_element(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.send_keys(press) if press else button.click()
    cells = table.find_elements(By.CSS_SELECTOR, f"td:nth-child({place + 1})")
    texts = browser.execute_script("return arguments[0].map((it) => it.textContent.trim())", cells)
    return headers[place], [text.partition(" ±")[0] for text in texts]


def test_a_click_on_a_title_sorts_and_a_second_reverses(loaded):
    header, texts = click_on_title(loaded, "passed for 99%")
    ascending = [float(text) for text in texts]
    assert ascending == sorted(ascending)
    assert header.get_attribute("aria-sort") == "ascending"
    header, texts = click_on_title(loaded, "passed for 99%", press=Keys.ENTER)
    assert [float(text) for text in texts] == ascending[::-1]
    assert header.get_attribute("aria-sort") == "descending"
    for _ in range(2):
        # The teacher, four references and mode none have no weight; empty cells stay last.
        _, weights = click_on_title(loaded, "weight")
        assert weights == ["10", "10", *[""] * 6]
