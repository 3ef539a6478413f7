"""The page in a real browser: opened from a file, a token picked, the weights read off it."""

import json
import os
import re
import shutil
from dataclasses import replace
from urllib.parse import quote

import pytest
from test_inspect import SUBLAYERS, TEXT, folders  # noqa: F401  a fixture

from modeling_attnres.conversion import inspect_checkpoint


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def inspection(folders):  # noqa: F811
    return inspect_checkpoint(folders / "step-200", TEXT, ablate=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update"),
        *("disable-background-networking", "disable-sync", "window-size=1200,900"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, inspection, tmp_path):
    path = tmp_path / "a page.html"
    path.write_text(inspection.page(), encoding="utf-8")
    browser.get(f"file://{quote(str(path))}")
    return browser


def table(page):
    """Caption, row labels, column labels, numbers."""
    script = """
        const map = document.getElementById("map");
        const texts = cells => [...cells].map(cell => cell.textContent);
        return [map.caption.textContent, texts(map.tBodies[0].querySelectorAll("th")),
                texts(map.tHead.rows[0].cells).slice(1),
                [...map.tBodies[0].rows].map(row => texts(row.querySelectorAll("td")).map(Number))];
    """
    return page.execute_script(script)


def expected(weights):
    """Weights times number of sources, as far as there are sources."""
    rows = [[w for w in row.tolist() if w == w] for row in weights]
    return [pytest.approx([w * len(row) for w in row], abs=0.0061) for row in rows]


@in_a_browser
def test_picking_a_token_shows_its_weights(page, inspection):
    from selenium.webdriver.common.by import By

    caption, sublayers, sources, mean = table(page)
    assert page.title == page.find_element(By.TAG_NAME, "h1").text == "Depth attention of step-200"
    assert "Mean over all tokens" in caption and sublayers == SUBLAYERS and sources == inspection.sources
    assert mean == expected(inspection.mean_weights)

    tokens = page.find_elements(By.CSS_SELECTOR, "#tokens button")
    assert [token.text for token in tokens] == TEXT.split()
    tokens[7].click()
    caption, _, _, at_7 = table(page)
    assert (
        caption.startswith("Token 7,")
        and inspection.tokens[7] in caption
        and at_7 == expected(inspection.weights[:, 7])
    )
    assert at_7 != mean and tokens[7].get_attribute("aria-pressed") == "true"
    page.find_element(By.ID, "mean").click()
    assert table(page)[3] == mean


@in_a_browser
def test_the_ablation(page, inspection):
    """It is of the whole text: tokens cannot be picked, and none of them changes the view."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(page.find_element(By.ID, "quantity")).select_by_visible_text("change in loss")
    caption, _, _, changes = table(page)
    assert "Change in loss" in caption
    for row, numbers in zip(inspection.loss_changes.tolist(), changes):
        assert numbers == pytest.approx([change for change in row if change == change], abs=6e-4)
    assert not page.find_element(By.CSS_SELECTOR, "#tokens button").is_enabled()


@in_a_browser
def test_it_asks_for_nothing_but_itself_and_logs_no_error(page):
    for log in ("performance", "browser"):
        page.get_log(log)  # of what was open before
    page.refresh()
    requests = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert len(requests) == 1 and requests[0].startswith("file://")
    assert not page.get_log("browser")
    screenshot = os.environ.get("ATTNRES_SCREENSHOT")  # to look at
    if screenshot:
        page.find_elements("css selector", "#tokens button")[5].click()
        page.save_screenshot(screenshot)


def test_a_text_cannot_break_out_of_the_page(inspection):
    tokens = ["</script><script>alert(1)</script>", "<!--", "__DATA__", *inspection.tokens[3:]]
    content = replace(inspection, name="<script>", tokens=tokens).page()
    assert content.count("<script") == content.count("</script>") == 2 and content.count("<!--") == 1
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', content)[1])
    assert data["tokens"] == tokens and data["name"] == "<script>"
