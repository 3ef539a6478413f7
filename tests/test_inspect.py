"""Inspect: its numbers against a forward pass written out here, its tables, pictures and command."""

import math
import re
import shutil
import struct

import pytest
import torch
from conftest import attnres_of, randomise_depth_attention, save_word_tokenizer, tiny_base
from test_cli import attnres
from transformers import AutoModelForCausalLM

from modeling_attnres import DepthAttention
from modeling_attnres.conversion import inspect_checkpoint, retrofit
from modeling_attnres.conversion.inspect_checkpoint import labels, tables
from modeling_attnres.conversion.pictures import write_pictures


WORDS = [f"word{i}" for i in range(99)]
TEXT = " ".join(WORDS[(7 * i * i + 3) % 99] for i in range(40))
INPUT_IDS = torch.tensor([[(7 * i * i + 3) % 99 for i in range(40)]])
SUBLAYERS = [f"layer {i} {kind}" for i in range(5) for kind in ("attention", "MLP")][1:] + ["output"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, its retrofit, and two checkpoints of a run from there: with trained queries, small and large."""
    root = tmp_path_factory.mktemp("inspect")
    base = tiny_base("llama")
    base.save_pretrained(root / "base")
    save_word_tokenizer(root / "base", WORDS)
    retrofit(root / "base", root / "retrofit", attn_res_block_size=2)
    for name, scale in (("step-100", 0.05), ("step-200", 0.5)):
        randomise_depth_attention(attnres_of(base, attn_res_block_size=2), scale).save_pretrained(root / name)
        save_word_tokenizer(root / name, WORDS)
    return root


@pytest.fixture(scope="module")
def inspection(folders):
    return inspect_checkpoint(folders / "step-200", TEXT, base=folders / "base", ablate=True)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def modules(model):
    return [module for module in model.modules() if isinstance(module, DepthAttention)]


@torch.no_grad()
def test_weights_entropies_queries_and_loss(folders, inspection):
    model = load(folders / "step-200")
    given = []
    for module in modules(model):
        module.register_forward_pre_hook(lambda module, sources: given.append((module, sources)))
    logits = model(INPUT_IDS).logits[0].double()
    loss = -logits[:-1].log_softmax(-1).gather(-1, INPUT_IDS[0, 1:, None]).mean().item()
    assert inspection.loss == pytest.approx(loss, abs=1e-5)
    assert inspection.sublayers == SUBLAYERS and inspection.tokens == TEXT.split()
    assert inspection.sources == ["embedding", "layers 0-1", "layers 2-3", "layer 4"]
    entropies = inspection.entropies
    for i, (module, sources) in enumerate(given):
        values = torch.stack(sources, -2)[0].double()
        keys = values / (values.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.key_norm.double()
        weights = (keys @ module.query.double()).softmax(-1)
        count = len(sources)
        torch.testing.assert_close(inspection.weights[i, :, :count].double(), weights, rtol=0, atol=1e-6)
        assert inspection.weights[i, :, count:].isnan().all()
        torch.testing.assert_close(inspection.mean_weights[i, :count].double(), weights.mean(0), rtol=0, atol=1e-6)
        entropy = torch.distributions.Categorical(probs=weights).entropy() / math.log(count)
        torch.testing.assert_close(entropies[i].double(), entropy, rtol=0, atol=1e-5)
        assert inspection.query_norms[i].item() == pytest.approx(module.query.norm().item())


def test_a_retrofit_is_uniform(folders):
    inspection = inspect_checkpoint(folders / "retrofit", TEXT)
    torch.testing.assert_close(inspection.entropies, torch.ones(10, 40))
    assert not inspection.query_norms.any() and inspection.loss_changes is None and inspection.dilution is None


@torch.no_grad()
def test_ablation_is_the_loss_with_the_logit_of_a_source_at_minus_infinity(folders, inspection):
    model = load(folders / "step-200")
    for name, source in (("layer 0 MLP", 0), ("layer 3 attention", 1), ("layer 4 MLP", 2), ("output", 3)):
        row = SUBLAYERS.index(name)
        module = modules(model)[row]

        def without(*sources, module=module, source=source, **_):
            values = torch.stack(sources, -2)
            keys = torch.nn.functional.rms_norm(values, values.shape[-1:], module.key_norm, module.eps)
            logits = keys @ module.query
            logits[..., source] = -torch.inf
            return ((len(sources) - 1) * logits.softmax(-1).unsqueeze(-1) * values).sum(-2)

        module.forward = without
        change = model(INPUT_IDS, labels=INPUT_IDS).loss.item() - inspection.loss
        del module.forward
        assert inspection.loss_changes[row, source].item() == pytest.approx(change, abs=2e-5)
        assert abs(change) > 1e-4
    assert torch.equal(inspection.loss_changes.isnan(), inspection.mean_weights.isnan())


def test_dilution_is_that_of_the_base_and_of_the_checkpoint(folders, inspection):
    base = load(folders / "base")
    output = base(INPUT_IDS, labels=INPUT_IDS, output_hidden_states=True)
    output.loss.backward()
    for i in range(4):  # the last hidden state is normed
        magnitude = output.hidden_states[i + 1][0].pow(2).mean(-1).sqrt().median().item()
        assert inspection.base_dilution.outputs[i] == pytest.approx(magnitude, rel=1e-5)
    for i, layer in enumerate(base.model.layers):
        squares = sum(parameter.grad.double().pow(2).sum() for parameter in layer.parameters())
        assert inspection.base_dilution.gradients[i] == pytest.approx(squares.sqrt().item(), rel=1e-4)
    model = load(folders / "step-200")
    given = []
    for layer in model.model.layers[1:]:
        layer.self_attention_res.register_forward_pre_hook(lambda module, sources: given.append(sources[-1]))
    model(INPUT_IDS)
    for magnitude, source in zip(inspection.dilution.outputs, given):
        assert magnitude == pytest.approx(source[0].pow(2).mean(-1).sqrt().median().item(), rel=1e-5)


def test_at_zero_queries_gradients_are_the_base_s(folders):
    inspection = inspect_checkpoint(folders / "retrofit", TEXT, base=folders / "base")
    assert inspection.dilution.gradients == pytest.approx(inspection.base_dilution.gradients, rel=1e-3)


def test_tables(folders, inspection):
    text = tables([inspect_checkpoint(folders / "step-100", TEXT), inspection])
    run = re.findall(r"^(step-\d00) +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert [row[0] for row in run] == ["step-100", "step-200"] and float(run[1][3]) > 5 * float(run[0][3])
    row = re.search(
        r"^layer 4 attention +([\d.]+) +([\d.]+) \(.*?\) +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE
    )
    expected = (3 * inspection.mean_weights[SUBLAYERS.index("layer 4 attention"), :3]).tolist()
    assert [float(number) for number in row.groups()[2:]] == pytest.approx(expected, abs=1e-3)
    i, j = divmod(inspection.loss_changes.nan_to_num(0).abs().argmax().item(), 4)
    first = re.search(r"change in loss\n(.*)", text)[1]
    assert first.startswith(SUBLAYERS[i]) and inspection.sources[j] in first
    assert float(first.split()[-1]) == pytest.approx(inspection.loss_changes[i, j].item(), abs=1e-4)


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_pictures(folders, inspection, tmp_path):
    run = [inspect_checkpoint(folders / name, TEXT) for name in ("retrofit", "step-100")]
    files = write_pictures([*run, inspection], tmp_path / "new" / "folder")
    names = {"weights.png", "entropy.png", "queries.png", "ablation.png", "dilution.png"}
    assert {file.name for file in files} == names == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert all(min(png_size(file)) > 200 for file in files)
    (alone,) = (file for file in write_pictures(run[:1], tmp_path) if file.name == "weights.png")
    assert png_size(alone)[0] < png_size(tmp_path / "new" / "folder" / "weights.png")[0]


def test_the_heat_map_shows_the_factors(inspection):
    """What matplotlib was given to draw, with its labels and the base's 1 in the middle of the colors."""
    from matplotlib.figure import Figure

    from modeling_attnres.conversion.pictures import draw_ablation, draw_weights

    factors = inspection.mean_weights * (~inspection.mean_weights.isnan()).sum(1, keepdim=True)
    for draw, drawn in (
        (draw_weights, [factors]),
        (draw_ablation, [factors, inspection.loss_changes]),
    ):
        figure = Figure()
        draw(figure, [inspection])
        panels = [axes for axes in figure.axes if axes.get_images()]
        assert len(panels) == len(drawn)
        for axes, values in zip(panels, drawn):
            # Seen through the cells that hold nothing
            assert axes.patch.get_hatch() and axes.patch.get_visible()
            shown = torch.tensor(axes.get_images()[0].get_array().filled(math.nan))
            torch.testing.assert_close(shown.float(), values, equal_nan=True)
            assert [label.get_text() for label in axes.get_xticklabels()] == inspection.sources
        assert panels[0].get_images()[0].norm(1.0) == 0.5
        # The panels share their rows
        assert [label.get_text() for label in panels[0].get_yticklabels()] == SUBLAYERS


def test_the_command(folders, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    shutil.copytree(folders / "step-100", tmp_path / "a" / "last")
    shutil.copytree(folders / "step-200", tmp_path / "b" / "last")
    arguments = ("inspect", tmp_path / "a" / "last", f"{tmp_path}/b/last/", "--text", tmp_path / "text.txt")
    result = attnres(*arguments, "--base", folders / "base", "--max-tokens", 20, "--output", tmp_path / "pictures")
    assert result.returncode == 0, result.stderr
    assert "b/last: 20 tokens" in result.stdout and "output, AttnRes" in result.stdout
    assert re.findall(r"^(./last) +[\d.]+ ", result.stdout, re.MULTILINE) == ["a/last", "b/last"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4


def test_labels_tell_checkpoints_apart(tmp_path, monkeypatch):
    for name in ("a/run/last", "b/run/last", "b/first"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b" / "first")
    for checkpoints, expected in [
        (["."], ["first"]),
        ([".."], ["b"]),
        (
            [tmp_path / "a" / "run" / "last", "../run/last/", "."],
            ["a/run/last", "b/run/last", f"{tmp_path.name}/b/first"],
        ),
        (["../run/last", "."], ["last", "first"]),
        (["someone/last", "../run/last/"], ["someone/last", "last"]),
        (["someone/last", "someone/last"], ["someone/last"] * 2),
    ]:
        assert labels(checkpoints) == expected


def test_what_is_wrong_is_said(folders, tmp_path):
    with pytest.raises(ValueError, match="is not an AttnRes checkpoint: its `model_type` is 'llama'"):
        inspect_checkpoint(folders / "base", TEXT)
    with pytest.raises(ValueError, match="The text has 1 tokens, but a loss needs at least 2"):
        inspect_checkpoint(folders / "retrofit", "word1")
    with pytest.raises(ValueError, match="has a base of type 'llama', but .* is of type 'qwen2'"):
        tiny_base("qwen2").save_pretrained(tmp_path / "qwen2")
        inspect_checkpoint(folders / "retrofit", TEXT, base=tmp_path / "qwen2")
    other = attnres_of(tiny_base("llama", num_hidden_layers=7), attn_res_type="full")
    other.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="has no tokenizer"):
        inspect_checkpoint(tmp_path / "full", TEXT)
    save_word_tokenizer(tmp_path / "full", WORDS)
    inspections = [inspect_checkpoint(folder, TEXT) for folder in (folders / "retrofit", tmp_path / "full")]
    with pytest.raises(ValueError, match="full has other sublayers or sources than retrofit"):
        write_pictures(inspections, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
    assert re.search(r"layer \d \w+ 1\.000  ", tables(inspections)), "too many for a matrix: three of them"
