"""The page: its markup, and what a browser makes of it."""

import shutil
from html.parser import HTMLParser

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kd_ranker.pipeline import commands
from tests.report import sweeps

FIGURES = 5
PANELS = 8  # three of them are calibration, two are training


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    one = sweeps.write_sweep(folder / "one", weights=sweeps.WEIGHTS)
    two = sweeps.write_sweep(folder / "two", "movielens_100k", weights=sweeps.WEIGHTS)
    return commands.report([one, two], folder)[1]


class Elements(HTMLParser):
    """Every element's name and attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_is_loaded_from_elsewhere(page):
    elements = Elements(page.read_text()).found
    loads = [
        attributes[name]
        for _, attributes in elements
        for name in ("src", "href", "srcset", "action", "data", "poster")
        if name in attributes
    ]
    assert loads
    assert all(load.startswith(("#", "data:")) for load in loads)
    assert not any("http" in (attributes.get("style") or "") for _, attributes in elements)


def test_plotly_is_there_once(page):
    text = page.read_text()
    assert text.count("plotly.js v") == 1
    assert len(text) < 8_000_000


def test_every_dataset_has_its_answer_figures_claims_and_config(page):
    elements = Elements(page.read_text()).found
    classes = [attributes.get("class") for _, attributes in elements]
    assert classes.count("sentence") == 2
    assert classes.count("chart") == 2 * PANELS
    assert classes.count("sortable") == 2 * 3
    assert sum(tag == "figure" for tag, _ in elements) == 2 * FIGURES
    assert sum(tag == "details" for tag, _ in elements) == 2


def test_what_a_config_says_cannot_break_the_page(tmp_path):
    name = "<script>alert(1)</script>"
    sweep = sweeps.write_sweep(tmp_path, changes={"data.path": name})
    text = commands.report([sweep], tmp_path)[1].read_text()
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
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def loaded(browser, page):
    browser.get(page.as_uri())
    # Two layers a plot, the second of which is for what lies above the first.
    drawn = "return document.querySelectorAll('.js-plotly-plot .main-svg').length"
    WebDriverWait(browser, 60).until(lambda it: it.execute_script(drawn) >= 2 * 2 * PANELS)
    return browser


def test_every_figure_is_drawn_without_an_error_or_a_request(loaded):
    assert loaded.execute_script(
        "return [...document.querySelectorAll('.chart')]"
        ".filter((it) => !it.querySelector('.trace, .scatterlayer path')).length"
    ) == 0  # fmt: skip
    assert [entry for entry in loaded.get_log("browser") if entry["level"] == "SEVERE"] == []
    requests = [
        entry["message"]
        for entry in loaded.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"]
    ]
    assert [it for it in requests if '"url":"http' in it] == []


def column(browser, place):
    return browser.execute_script(
        "return [...document.querySelectorAll('table.sortable')[1].tBodies[0].rows]"
        f".map((row) => row.cells[{place}].dataset.value)"
    )


def test_a_click_on_a_columns_title_sorts_and_a_second_turns_it_round(loaded):
    table = loaded.find_elements(By.CSS_SELECTOR, "table.sortable")[1]
    titles = [it.text.split(" ↕")[0] for it in table.find_elements(By.CSS_SELECTOR, "th")]
    place = titles.index("passed for 99%")
    header = table.find_elements(By.CSS_SELECTOR, "th")[place]
    button = header.find_element(By.TAG_NAME, "button")
    before = column(loaded, place)

    loaded.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    ascending = [float(value) for value in column(loaded, place)]
    assert ascending == sorted(float(value) for value in before)
    assert header.get_attribute("aria-sort") == "ascending"

    # By the keyboard.
    button.send_keys(Keys.ENTER)
    assert [float(value) for value in column(loaded, place)] == ascending[::-1]
    assert header.get_attribute("aria-sort") == "descending"


def test_empty_cells_stay_last(loaded):
    table = loaded.find_elements(By.CSS_SELECTOR, "table.sortable")[1]
    button = table.find_elements(By.CSS_SELECTOR, "th button")[2]
    assert button.text.startswith("weight")
    for _ in range(2):
        loaded.execute_script("arguments[0].click()", button)
        # The teacher and mode none have no weight.
        assert [value == "" for value in column(loaded, 2)][-2:] == [True, True]
        assert "" not in column(loaded, 2)[:-2]


@pytest.mark.parametrize("width", [420, 1400])
def test_the_page_fits_its_window(loaded, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    loaded.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # The plots follow a moment later.
    wide = "return document.documentElement.scrollWidth"
    WebDriverWait(loaded, 20).until(lambda it: it.execute_script(wide) <= width)
