"""The page: its markup, and what a browser makes of it."""

import re
import shutil
from html.parser import HTMLParser

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kd_ranker import api
from tests.report import sweeps

FIGURES = 10
PANELS = 14  # three of them are calibration, two are training, two are savings


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    one = sweeps.write_sweep(folder / "one", weights=sweeps.WEIGHTS)
    two = sweeps.write_sweep(folder / "two", "movielens_100k", weights=sweeps.WEIGHTS)
    return api.report(one, two, output=folder).page


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


def test_vega_is_there_once(page):
    text = page.read_text()
    assert text.count("window.vegaEmbed") == 1
    assert len(text) < 2_000_000


def test_every_dataset_has_its_answer_figures_claims_and_config(page):
    elements = Elements(page.read_text()).found
    classes = [attributes.get("class") for _, attributes in elements]
    assert classes.count("sentence") == 2
    assert classes.count("chart") == 2 * PANELS
    assert classes.count("sortable") == 2 * 6
    assert sum(tag == "figure" for tag, _ in elements) == 2 * FIGURES
    assert sum(tag == "details" for tag, _ in elements) == 2


def test_what_a_config_says_cannot_break_the_page(tmp_path):
    name = "<script>alert(1)</script>"
    sweep = sweeps.write_sweep(tmp_path, modes=("none",), seeds=(0,), changes={"data.path": name})
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
    drawn = "return document.querySelectorAll('.chart svg').length"
    WebDriverWait(browser, 60).until(lambda it: it.execute_script(drawn) == 2 * PANELS)
    return browser


def test_every_figure_is_drawn_without_an_error_or_a_request(loaded):
    assert loaded.execute_script(
        "return [...document.querySelectorAll('.chart')]"
        ".filter((it) => !it.querySelector('.mark-line path')).length"
    ) == 0  # fmt: skip
    assert [entry for entry in loaded.get_log("browser") if entry["level"] == "SEVERE"] == []
    requests = [
        entry["message"]
        for entry in loaded.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"]
    ]
    assert [it for it in requests if '"url":"http' in it] == []


def test_a_point_tells_its_numbers_under_the_pointer(loaded):
    (_, point, *_) = loaded.find_elements(By.CSS_SELECTOR, ".pareto .mark-symbol.role-mark")
    mark = point.find_element(By.TAG_NAME, "path")
    loaded.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(loaded).move_to_element(mark).perform()
    shown = "#vg-tooltip-element.visible"
    WebDriverWait(loaded, 20).until(lambda it: it.find_elements(By.CSS_SELECTOR, shown))
    told = loaded.find_element(By.CSS_SELECTOR, shown).text
    assert re.search(r"setting:?\s+none\s", told)
    assert re.search(r"user BCE:?\s+0\.\d{4}\s", told)


def test_a_click_in_the_legend_fades_the_other_lines_and_one_beside_it_brings_them_back(loaded):
    def opacities():
        paths = loaded.find_elements(By.CSS_SELECTOR, ".survival .mark-line.role-mark path")
        return {path.get_attribute("stroke"): path.get_attribute("opacity") for path in paths[:3]}

    def click(selector):
        loaded.execute_script("arguments[0].scrollIntoView({block: 'center'})", of(selector))
        ActionChains(loaded).move_to_element(of(selector)).click().perform()

    def of(selector):
        return loaded.find_element(By.CSS_SELECTOR, f".survival {selector}")

    before = opacities()
    assert set(before.values()) == {"1"}
    click(".role-legend-label text")
    WebDriverWait(loaded, 20).until(lambda _: opacities() != before)
    none, *others = opacities().values()
    assert float(none) == 1
    assert all(float(other) < 0.2 for other in others)
    click(".role-axis-title text")
    WebDriverWait(loaded, 20).until(lambda _: opacities() == before)


def column(browser, place):
    return browser.execute_script(
        "return [...document.querySelectorAll('table.sortable').page.tBodies[0].rows]"
        f".map((row) => row.cells[{place}].dataset.value)"
    )


def test_a_click_on_a_columns_title_sorts_and_a_second_turns_it_round(loaded):
    table = loaded.find_elements(By.CSS_SELECTOR, "table.sortable").page
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
    table = loaded.find_elements(By.CSS_SELECTOR, "table.sortable").page
    button = table.find_elements(By.CSS_SELECTOR, "th button")[2]
    assert button.text.startswith("weight")
    for _ in range(2):
        loaded.execute_script("arguments[0].click()", button)
        # The teacher, two references and mode none have no weight.
        weights = column(loaded, 2)
        assert weights[-4:] == [""] * 4
        assert "" not in weights[:-4]


@pytest.mark.parametrize("width", [420, 1400])
def test_the_page_fits_its_window(loaded, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    loaded.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # The plots follow a moment later.
    wide = "return document.documentElement.scrollWidth"
    WebDriverWait(loaded, 20).until(lambda it: it.execute_script(wide) <= width)
