"""The page in a real browser: opened from a file, a token picked, the weights read off it."""

import json
import os
import re
import shutil
from urllib.parse import quote

import pytest
from test_inspect import SUBLAYERS, TEXT, folders  # noqa: F401  a fixture

from modeling_attnres.conversion import inspect_checkpoint
from modeling_attnres.conversion.page import write_page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def inspections(folders):  # noqa: F811
    return [
        inspect_checkpoint(folders / "step-100", TEXT),
        inspect_checkpoint(folders / "step-200", TEXT, ablate=True),
    ]


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
def page(browser, inspections, tmp_path):
    path = write_page(inspections, tmp_path / "a page.html")
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
def test_picking_a_token_shows_its_weights(page, inspections):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    last = inspections[-1]
    caption, sublayers, sources, mean = table(page)
    assert "Mean over all tokens" in caption and sublayers == SUBLAYERS and sources == last.sources
    assert mean == expected(last.mean_weights)

    tokens = page.find_elements(By.CSS_SELECTOR, "#tokens button")
    assert [token.text for token in tokens] == TEXT.split()
    tokens[7].click()
    caption, _, _, at_7 = table(page)
    assert caption.startswith("Token 7,") and last.tokens[7] in caption and at_7 == expected(last.weights[:, 7])
    assert at_7 != mean and tokens[7].get_attribute("aria-pressed") == "true"
    tokens[7].send_keys(Keys.ARROW_RIGHT)
    assert table(page)[3] == expected(last.weights[:, 8]) and page.switch_to.active_element.text == last.tokens[8]
    page.find_element(By.ID, "mean").click()
    assert table(page)[3] == mean


@in_a_browser
def test_other_checkpoints_and_the_ablation(page, inspections):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    quantity = Select(page.find_element(By.ID, "quantity"))
    quantity.select_by_visible_text("change in loss")
    caption, _, _, changes = table(page)
    assert "Change in loss" in caption
    for row, numbers in zip(inspections[1].loss_changes.tolist(), changes):
        assert numbers == pytest.approx([change for change in row if change == change], abs=6e-4)
    Select(page.find_element(By.ID, "checkpoint")).select_by_index(0)
    assert table(page)[3] == expected(inspections[0].mean_weights)
    assert [option.text for option in quantity.options] == ["weight × sources"], "the first was not ablated"


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


def test_a_text_cannot_break_out_of_the_page(inspections, tmp_path):
    last = inspections[-1]
    tokens = ["</script><script>alert(1)</script>", "<!--", "__DATA__", *last.tokens[3:]]
    hostile = type(last)(**{**vars(last), "tokens": tokens})
    content = write_page([hostile], tmp_path / "page.html").read_text()
    assert content.count("<script") == content.count("</script>") == 2 and content.count("<!--") == 1
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', content)[1])
    assert data["checkpoints"][0]["tokens"] == tokens
