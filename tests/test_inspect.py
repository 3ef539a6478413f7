"""Inspect: its numbers, computed here from what test_probing.py tests; its tables, command and page; the pictures."""

import html
import json
import math
import re
import shutil
from dataclasses import replace

import plot_inspection
import pytest
import torch
from helpers import BLOCK, invoke_attnres, randomize_depth_attention, run_example, save_word_tokenizer, tiny_base
from peft import LoraConfig, get_peft_model
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import ATTN_RES_MODULES
from modeling_attnres.conversion import inspect_checkpoint, inspect_model, retrofit
from modeling_attnres.probing import depth_attentions, masked_sources, recorded_weights


WORDS = [f"word{i}" for i in range(99)]
INPUT_IDS = torch.tensor([[(7 * i * i + 3) % 99 for i in range(40)]])
TEXT = " ".join(WORDS[i] for i in INPUT_IDS[0])
SUBLAYERS = [f"layer {i} {kind}" for i in range(5) for kind in ("attention", "MLP")][1:] + ["output"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text, a base, its retrofit, and two checkpoints of a run from there: with trained queries, small and large."""
    root = tmp_path_factory.mktemp("inspect")
    (root / "text.txt").write_text(TEXT)
    tiny_base("llama").save_pretrained(root / "base")
    save_word_tokenizer(root / "base", WORDS)
    retrofit(root / "base", root / "retrofit", **BLOCK)
    for name, scale in (("step-100", 0.01), ("step-200", 0.125)):
        randomize_depth_attention(load(root / "retrofit"), scale).save_pretrained(root / name)
        save_word_tokenizer(root / name, WORDS)
    return root


@pytest.fixture(scope="module")
def inspection(folders):
    return inspect_checkpoint(folders / "step-200", TEXT, ablate=True)


@torch.no_grad()
def test_weights_entropies_queries_and_loss(folders, inspection):
    model = load(folders / "step-200")
    with recorded_weights(model) as recorded:
        logits = model(INPUT_IDS).logits[0].double()
    loss = -logits[:-1].log_softmax(-1).gather(-1, INPUT_IDS[0, 1:, None]).mean().item()
    assert inspection.loss == pytest.approx(loss, abs=1e-5)
    assert inspection.sublayers == SUBLAYERS == list(recorded) and inspection.tokens == TEXT.split()
    assert inspection.sources == ["embedding", "layers 0-1", "layers 2-3", "layer 4"]
    for i, (name, ((weights,),)) in enumerate(recorded.items()):
        count = weights.shape[-1]
        torch.testing.assert_close(inspection.weights[i, :, :count], weights, rtol=0, atol=1e-6)
        assert inspection.weights[i, :, count:].isnan().all()
        torch.testing.assert_close(inspection.mean_weights[i, :count], weights.mean(0), rtol=0, atol=1e-6)
        entropy = torch.distributions.Categorical(probs=weights).entropy() / math.log(count)
        torch.testing.assert_close(inspection.entropies[i], entropy, rtol=0, atol=1e-5)
        query = depth_attentions(model)[name].query
        assert inspection.query_norms[i].item() == pytest.approx(query.norm().item())


def test_a_retrofit_is_uniform(folders):
    inspection = inspect_checkpoint(folders / "retrofit", TEXT)
    torch.testing.assert_close(inspection.entropies, torch.ones(10, 40))
    assert not inspection.query_norms.any() and inspection.loss_changes is None
    assert str(inspection).count("\n") == 0 and "All queries are zero" in str(inspection)
    ablation = replace(inspection, loss_changes=inspection.mean_weights)
    assert "All queries are zero" in str(ablation) and "Change in loss without one source" in str(ablation)


@torch.no_grad()
def test_ablation_is_the_change_of_the_loss_without_a_source(folders, inspection):
    model = load(folders / "step-200")
    for name, source in (("layer 0 MLP", 0), ("layer 3 attention", 1), ("layer 4 MLP", 2), ("output", 3)):
        row, mask = SUBLAYERS.index(name), torch.ones(10, 4, dtype=torch.bool)
        mask[row, source] = False
        with masked_sources(model, mask):
            change = model(INPUT_IDS, labels=INPUT_IDS).loss.item() - inspection.loss
        assert inspection.loss_changes[row, source].item() == pytest.approx(change, abs=2e-5)
        assert abs(change) > 1e-4
    assert torch.equal(inspection.loss_changes.isnan(), inspection.mean_weights.isnan())


def test_tables(inspection):
    text = str(inspection)
    assert max(map(len, text.splitlines())) <= 80
    row = re.search(r"^layer 4 attention +(\S+) +(\S+) +(\S.*?) +([+-]\S+)%$", text, re.MULTILINE)
    index = SUBLAYERS.index("layer 4 attention")
    factors = 3 * inspection.mean_weights[index, :3]
    farthest = (factors - 1).abs().argmax().item()
    assert float(row[1]) == pytest.approx(inspection.query_norms[index].item(), rel=0.05)
    assert float(row[2]) == pytest.approx(1 - inspection.entropies[index].mean().item(), rel=0.06)
    assert row[3] == inspection.sources[farthest]
    assert float(row[4]) == pytest.approx(100 * (factors[farthest].item() - 1), rel=0.06)
    i, j = divmod(inspection.loss_changes.nan_to_num(0).abs().argmax().item(), 4)
    first = re.search(r"change in loss\n(.*)", text)[1]
    assert first.startswith(SUBLAYERS[i]) and inspection.sources[j] in first
    assert float(first.split()[-1]) == pytest.approx(inspection.loss_changes[i, j].item(), rel=0.01)


def test_a_model_in_memory_and_a_notebook(folders, inspection):
    tokenizer = AutoTokenizer.from_pretrained(folders / "step-200")
    model = load(folders / "step-200").train()
    in_memory = inspect_model(model, tokenizer, TEXT)
    assert model.training and torch.equal(in_memory.weights.nan_to_num(), inspection.weights.nan_to_num())
    assert html.escape(in_memory.page()) in in_memory._repr_html_()


def test_an_adapter(folders, tmp_path):
    """Its base is read from its own configuration. Queries, tokenizer and new embeddings are those of the adapter."""
    model = AutoModelForCausalLM.from_pretrained(folders / "retrofit")
    model.resize_token_embeddings(100)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if name.endswith("query") and parameter.requires_grad:
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    save_word_tokenizer(tmp_path / "adapter", [*WORDS, "new"])
    expected = inspect_model(model, AutoTokenizer.from_pretrained(tmp_path / "adapter"), f"new {TEXT}")
    inspection = inspect_checkpoint(tmp_path / "adapter", f"new {TEXT}")
    assert inspection.loss == pytest.approx(expected.loss, abs=1e-5) and inspection.tokens[0] == "new"
    assert inspection.name == "adapter" and (inspection.query_norms > 1).all()
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        inspect_checkpoint(tmp_path / "adapter", TEXT)


def test_the_command(folders, tmp_path):
    arguments = (folders / "step-200", "--text", folders / "text.txt", "--max-tokens", 20)
    result = invoke_attnres("inspect", *arguments, "--json", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    expected = inspect_checkpoint(folders / "step-200", TEXT, max_tokens=20)
    assert content["tokens"] == expected.tokens and content["loss"] == pytest.approx(expected.loss)
    assert content["factors"][3][5] == pytest.approx((2 * expected.weights[3, 5, :2]).tolist(), rel=1e-4)
    assert (tmp_path / "page.html").read_text() == expected.page()


def test_errors(folders, tmp_path):
    with pytest.raises(ValueError, match="is not an AttnRes checkpoint: its `model_type` is 'llama'"):
        inspect_checkpoint(folders / "base", TEXT)
    with pytest.raises(ValueError, match="The text has 1 tokens, but a loss needs at least 2"):
        inspect_checkpoint(folders / "retrofit", "word1")
    shutil.copytree(folders / "retrofit", tmp_path / "no-tokenizer", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        inspect_checkpoint(tmp_path / "no-tokenizer", TEXT)


def test_pictures(folders, tmp_path):
    run = [folders / name for name in ("retrofit", "step-100", "step-200")]
    options = ("--base", folders / "base", "--ablate", "--text", folders / "text.txt", "--max-tokens", 20)
    run_example("experiments/plot_inspection.py", *run, *options, "--output", tmp_path / "new" / "folder")
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert pictures.keys() == {f"{name}.png" for name in ("weights", "entropy", "queries", "ablation", "dilution")}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_dilution_is_that_of_the_base_and_of_the_checkpoint(folders):
    outputs, gradients = plot_inspection.dilution(folders / "base", TEXT, 512)
    base = load(folders / "base")
    output = base(INPUT_IDS, labels=INPUT_IDS, output_hidden_states=True)
    output.loss.backward()
    for i in range(4):  # the last hidden state is normed
        magnitude = output.hidden_states[i + 1][0].pow(2).mean(-1).sqrt().median().item()
        assert outputs[i] == pytest.approx(magnitude, rel=1e-5)
    for i, layer in enumerate(base.model.layers):
        squares = sum(parameter.grad.double().pow(2).sum() for parameter in layer.parameters())
        assert gradients[i] == pytest.approx(squares.sqrt().item(), rel=1e-4)
    # At zero queries the gradients are the base's
    assert plot_inspection.dilution(folders / "retrofit", TEXT, 512)[1] == pytest.approx(gradients, rel=1e-3)
    model = load(folders / "step-200")
    given = []
    for layer in model.model.layers[1:]:
        layer.self_attention_res.register_forward_pre_hook(lambda module, sources: given.append(sources[-1]))
    model(INPUT_IDS)
    for magnitude, source in zip(plot_inspection.dilution(folders / "step-200", TEXT, 512)[0], given):
        assert magnitude == pytest.approx(source[0].pow(2).mean(-1).sqrt().median().item(), rel=1e-5)


# The page in a real browser: opened from a file, a token picked, the weights read off it


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-quic", "disable-background-networking", "window-size=1200,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def tab(browser):
    """A new tab: emulated devices and colors are those of one tab."""
    browser.switch_to.new_window("tab")
    return browser


def show(tab, inspection, folder):
    (folder / "a page.html").write_text(inspection.page(), encoding="utf-8")
    tab.get((folder / "a page.html").as_uri())


@pytest.fixture
def page(tab, inspection, tmp_path):
    show(tab, inspection, tmp_path)
    return tab


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


def test_picking_a_token_shows_its_weights(page, inspection):
    caption, sublayers, sources, mean = table(page)
    assert page.title == page.find_element(By.TAG_NAME, "h1").text == "Depth attention of step-200"
    assert "Mean over all tokens" in caption and sublayers == SUBLAYERS and sources == inspection.sources
    assert mean == expected(inspection.mean_weights)

    tokens = page.find_elements(By.CSS_SELECTOR, "#tokens button")
    assert [token.text for token in tokens] == TEXT.split()
    tokens[7].click()
    caption, _, _, at_7 = table(page)
    assert caption.startswith("Token 7,") and inspection.tokens[7] in caption
    assert at_7 == expected(inspection.weights[:, 7])
    assert at_7 != mean and tokens[7].get_attribute("aria-pressed") == "true"
    page.find_element(By.ID, "mean").click()
    assert table(page)[3] == mean


def test_the_ablation_is_of_the_whole_text(page, inspection):
    """No token changes it, and the token picked before is shown again after it."""
    tokens = page.find_elements(By.CSS_SELECTOR, "#tokens button")
    quantity = Select(page.find_element(By.ID, "quantity"))
    tokens[7].click()
    at_7 = table(page)
    quantity.select_by_visible_text("change in loss")
    ablation = table(page)
    assert "Change in loss" in ablation[0]
    for row, numbers in zip(inspection.loss_changes.tolist(), ablation[3]):
        assert numbers == pytest.approx([change for change in row if change == change], abs=6e-4)
    assert not tokens[9].is_enabled()
    tokens[9].click()
    assert table(page) == ablation
    quantity.select_by_index(0)
    assert table(page) == at_7


def test_the_page_explains_itself(page, inspection):
    """The color of the number farthest from 1 is an end of the legend."""
    explanation = page.find_element(By.TAG_NAME, "details")
    assert explanation.text == "How to read this"
    explanation.find_element(By.TAG_NAME, "summary").click()
    assert "1 is as in the base" in explanation.text
    row, column = divmod((inspection.mean_factors - 1).abs().nan_to_num(0).argmax().item(), 4)
    cell = page.find_elements(By.CSS_SELECTOR, "tbody tr")[row].find_elements(By.TAG_NAME, "td")[column]
    red, green, blue = re.findall(r"\d+", cell.value_of_css_property("background-color"))[:3]
    legend = page.find_element(By.ID, "legend").value_of_css_property("background-image")
    assert f"rgb({red}, {green}, {blue})" in legend


def test_on_a_phone(tab, inspection, tmp_path):
    """The table scrolls in its own frame, and its headers stay in view, above the numbers. 40 sublayers, 20 sources."""
    size = {"sublayers": [f"layer {i} MLP" for i in range(40)], "sources": [f"layer {i}" for i in range(20)]}
    phone = {"width": 375, "height": 667, "deviceScaleFactor": 1, "mobile": True}
    tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    show(tab, replace(inspection, **size, weights=torch.rand(40, 40, 20), loss_changes=None), tmp_path)
    width, left, top, corner, column, row = tab.execute_script("""
        const [frame, head] = [document.getElementById("scroll"), map.tHead.rows[0].cells];
        frame.scrollIntoView({block: "end"});
        frame.scrollTo(90, 90);
        const {left, top, right, bottom} = frame.getBoundingClientRect();
        const shown = (x, y) => document.elementFromPoint(x, y).closest("th")?.textContent;
        const [x, y] = [left + head[0].offsetWidth / 2, top + head[0].offsetHeight / 2];
        return [document.documentElement.scrollWidth, frame.scrollLeft, frame.scrollTop,
                shown(x, y), shown(right - 60, y), shown(x, bottom - 60)];
    """)
    assert (width, left, top) == (375, 90, 90)
    assert corner == "" and column in size["sources"] and row in size["sublayers"]


@pytest.mark.parametrize("scheme, is_dark", [("dark", True), ("light", False)])
def test_dark_mode(scheme, is_dark, page):
    """Light on dark where the system asks for it."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for header in page.find_elements(By.TAG_NAME, "th"):
        text, ground = (
            sum(map(int, re.findall(r"\d+", header.value_of_css_property(name))[:3]))
            for name in ("color", "background-color")
        )
        assert (text > ground) == is_dark and abs(text - ground) > 600


def test_it_asks_for_nothing_but_itself_and_logs_no_error(page):
    for log in ("performance", "browser"):
        page.get_log(log)  # drops the entries of earlier pages
    page.refresh()
    requests = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert len(requests) == 1 and requests[0].startswith("file://")
    assert not page.get_log("browser")


def test_a_text_cannot_break_out_of_the_page(inspection):
    tokens = ["</script><script>alert(1)</script>", "<!--", "__DATA__", *inspection.tokens[3:]]
    content = replace(inspection, name="<script>", tokens=tokens).page()
    assert content.count("<script") == content.count("</script>") == 2 and content.count("<!--") == 1
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', content)[1])
    assert data["tokens"] == tokens and data["name"] == "<script>"
