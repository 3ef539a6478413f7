"""The examples on small models and few steps."""

import copy
import json
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import continue_training
import finetune_lora
import pytest
import torch
from helpers import EXAMPLES, attnres_of, greedy, json_lines, logged_losses, run_example, save, tiny_base, trained
from peft import PeftModel
from text import token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import DepthAttention
from modeling_attnres.conversion import retrofit


SCRIPTS = [
    path.relative_to(EXAMPLES)
    for path in sorted(EXAMPLES.rglob("*.py"))
    # `transformers_serve.py` has the options of another command
    if "__main__" in path.read_text() and path.stem != "transformers_serve"
]
SHORT = ("--max_length", 64, "--report_to", "none", "--bf16", "false", "--use_cpu", "true")
SMALL = ("--hidden-size", 64, "--layers", 3, "--vocab-size", 400)


@pytest.fixture(scope="module")
def files(real_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(real_text)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def base_folder(files, tmp_path_factory):
    """A base that train_base.py has trained, which has to learn."""
    folder = tmp_path_factory.mktemp("base") / "base"
    output = run_example("experiments/train_base.py", folder, "--files", *files, "--steps", 8, *SMALL)
    assert "million parameters" in output
    before, after = (float(word) for word in output.split("held-out text: ")[1].split()[:3:2])
    assert after < before - 0.2
    return folder


def test_blocks_of_any_number_of_texts(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    files = [tmp_path / f"{number}.txt" for number in range(20)]
    for number, file in enumerate(files):
        file.write_text(f"{number} " * 40)

    def words(blocks):
        return set(tokenizer.decode(sum((row["input_ids"].tolist() for row in blocks), [])).split())

    train, held_out = token_blocks(files, tokenizer, 8)
    assert {"9", "19"} <= words(held_out) and not {"9", "19"} & words(train)
    # With one file, its end is held out
    train, held_out = token_blocks(files[:1], tokenizer, 8)
    assert len(held_out) == -(-(len(train) + len(held_out)) // 10)
    tokenizer.eos_token = None
    assert words(token_blocks(files[:2], tokenizer, 8)[1]) == {"1"}
    with pytest.raises(ValueError, match="1 text files do not make two blocks of 400 tokens.*give more text"):
        token_blocks(files[:1], tokenizer, 400)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help(script, capsys):
    try:
        with pytest.raises(SystemExit) as end:
            run_example(script, "--help")
    except ImportError as error:
        pytest.skip(f"needs {error.name}")
    assert end.value.code == 0


def test_quickstart(smollm2_folder, tmp_path):
    (tmp_path / "base").symlink_to(smollm2_folder)
    output = run_example("quickstart.py", "--folder", tmp_path, "--steps", 1)
    base, attnres = (output.split(f"{name}: ")[1].splitlines()[0].strip() for name in ("base", "AttnRes"))
    assert base == attnres and "Paris" in base
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert model.config.model_type == "attnres"
    assert all((layer.mlp_res.query != 0).any() for layer in model.model.layers)


def test_the_notebook(tokenizer, tmp_path):
    """With a small base, in a Jupyter kernel. The trained queries are in its last outputs."""
    nbclient = pytest.importorskip("nbclient", reason="`pip install nbclient ipykernel`")
    nbformat = pytest.importorskip("nbformat")
    base = save(tmp_path / "base", tiny_base("llama", vocab_size=len(tokenizer)), tokenizer)
    text = (EXAMPLES / "quickstart.ipynb").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text
    notebook = nbformat.reads(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base)), 4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Same: largest difference" in printed
    assert "All queries are zero" not in printed and "layer 4 MLP" in printed
    assert any("<iframe" in output.get("data", {}).get("text/html", "") for output in outputs)


@pytest.mark.parametrize("load_data", [finetune_lora.load_data, continue_training.load_data])
def test_examples_read_text_and_chats_and_refuse_anything_else(load_data, tmp_path):
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant", "user")]
    rows = {"chat": {"messages": chat, "id": 3}, "question": {"messages": chat[:2]}, "text": {"text": "a"}}
    for name, row in {**rows, "other": {"body": "a"}}.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n")
    (tmp_path / "text.txt").write_text("Two\nlines")
    (tmp_path / "dataset").mkdir()
    shutil.copy(tmp_path / "text.jsonl", tmp_path / "dataset" / "train.jsonl")

    def load(*names):
        return list(load_data([str(tmp_path / name) for name in names]))

    assert load("chat.jsonl") == [{"prompt": chat[:end], "completion": [chat[end]]} for end in (2, 4)]
    assert load("text.jsonl") == load("dataset") == [{"text": "a"}]
    assert load("text.txt", "text.txt") == 2 * [{"text": "Two\nlines"}]
    with pytest.raises(ValueError, match="body.*Supported: `text`, `messages`, or `prompt` and `completion`"):
        load("other.jsonl")
    with pytest.raises(ValueError, match="question.jsonl.*have no message of the `assistant`"):
        load("question.jsonl")
    for names in (("text.txt", "chat.jsonl"), ("text.csv", "text.csv")):
        with pytest.raises(ValueError, match="give only `.txt` files, only `.jsonl` files, or one dataset"):
            load(*names)


@pytest.mark.parametrize("script", ["continue_training.py", "finetune_lora.py"])
def test_only_the_replies_of_a_chat_have_a_loss(script, tokenizer, tmp_path):
    """The first loss is the base's on the tokens that the chat template adds to the prompt."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    base = tiny_base("llama", vocab_size=len(tokenizer))
    save(tmp_path / "attnres", attnres_of(base), tokenizer)
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    options = ("--model", tmp_path / "attnres", "--data", tmp_path / "chat.jsonl", "--output_dir", tmp_path / "trained")
    run_example(script, *options, *SHORT, "--max_steps", 1, "--logging_steps", 1, "--save_steps", 1)

    prompt, text = "<user>One?\n<assistant>", "<user>One?\n<assistant>Two.\n"
    inputs = tokenizer(text, return_tensors="pt")["input_ids"]
    labels = inputs.clone()
    labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
    expected = base(inputs, labels=labels).loss.item()
    assert logged_losses(tmp_path / "trained" / "checkpoint-1") == [pytest.approx(expected, abs=1e-4)]


def test_retrofit_train_and_chat(base_folder, files, tmp_path):
    retrofit(base_folder, tmp_path / "attnres")
    options = ("--model", tmp_path / "attnres", "--data", *files, *SHORT, "--max_steps", 1)
    rates = ("--attn_res_learning_rate", 5e-4)
    run_example("continue_training.py", *options, "--output_dir", tmp_path / "trained", *rates)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert model.config.model_type == "attnres"
    # One step of Adam, as long as the learning rate
    assert model.model.layers[-1].output_res.query.abs().max().item() == pytest.approx(5e-4, rel=1e-2)

    # Query and key norm of six depth attentions; LoRAs in three layers
    alone = f"trainable params: {6 * 2 * 64} "
    for option, printed, num_loras in (("--attn_res_only=true", alone, 0), ("--rank=2", "trainable params", 3)):
        output = run_example("finetune_lora.py", *options, "--output_dir", tmp_path / "adapter", option)
        assert printed in output
        retrofitted = AutoModelForCausalLM.from_pretrained(tmp_path / "attnres")
        adapted = PeftModel.from_pretrained(retrofitted, tmp_path / "adapter")
        loras = [parameter for name, parameter in adapted.named_parameters() if "q_proj.lora_B" in name]
        assert len(loras) == num_loras and all((parameter != 0).any() for parameter in loras)
        assert (adapted.merge_and_unload().model.layers[-1].output_res.query != 0).any()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    (tokens,) = greedy(model, [tokenizer("import").input_ids], max_new_tokens=5)
    output = run_example("chat.py", tmp_path / "trained", "import", "--max-new-tokens", 5)
    assert output.strip() == tokenizer.decode(tokens).strip()


def test_compare_training(base_folder, files, tmp_path):
    arguments = ("--files", *files, "--steps", 2)
    compared = (*arguments, "--eval-steps", 1, "--eval-blocks", 4, "--rates", 1e-3, "--attn-res-rates", 5e-4)
    compared += ("--save", tmp_path / "models", "--output", tmp_path / "compared.jsonl")
    run_example("experiments/compare_training.py", base_folder, *compared)
    runs = json_lines(tmp_path / "compared.jsonl")
    assert [run["arm"] for run in runs] == ["base", "attnres", "attnres-only", "lora", "lora-attnres"]
    first, _, last = ([run["losses"][i]["loss"] for run in runs] for i in range(3))
    assert first == pytest.approx([first[0]] * 5, abs=1e-4), "each arm starts as the base"
    assert len({round(loss, 5) for loss in (first[0], *last)}) == 6, "and ends at its own loss"
    for arm in ("attnres", "attnres-only", "lora-attnres"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / f"{arm}-0.001-0.0005-seed0")
        assert (model.model.layers[-1].output_res.query != 0).any()
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
            for folder in (base_folder, model.name_or_path)
        )
        assert torch.equal(before, after) == (arm == "attnres-only")

    # One learning rate for all parameters, and SGD, for which a step of this learning rate is tiny
    plain = (*arguments, "--eval-steps", 1, "--eval-blocks", 4, "--rates", 1e-6, "--optim", "sgd", "--arms", "attnres")
    run_example("experiments/compare_training.py", base_folder, *plain, "--output", tmp_path / "plain.jsonl")
    (row,) = json_lines(tmp_path / "plain.jsonl")
    assert row["optim"] == "sgd" and row["losses"][-1]["loss"] == pytest.approx(first[0], abs=1e-4)


def test_from_scratch_with_tensorboard_and_resumed(files, tmp_path):
    scratch = ("--files", *files, "--steps", 2, *SMALL, "--attnres", "full")
    run_example("experiments/train_base.py", tmp_path / "scratch", *scratch)
    config = json.loads((tmp_path / "scratch" / "config.json").read_text())
    assert (config["attn_res_type"], config["attn_res_scale"]) == ("full", "mean")
    options = ("--model", tmp_path / "scratch", "--data", *files, *SHORT, "--max_steps", 4, "--logging_steps", 1)
    options += ("--save_steps", 2, "--output_dir", tmp_path / "trained", "--report_to", "tensorboard")
    run_example("continue_training.py", *options)
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    assert b"train/loss" in events and b"train/depth_attention/1-entropy" in events

    # The state of a run that was killed while it wrote its last checkpoint
    output = tmp_path / "trained"
    weights = (output / "model.safetensors").read_bytes()
    for lost in ("checkpoint-4/trainer_state.json", "checkpoint-4/optimizer.pt", "model.safetensors"):
        (output / lost).unlink()
    run_example("continue_training.py", *options, "--resume", "true")
    assert (output / "model.safetensors").read_bytes() == weights
    # The state of a run that was killed before its first checkpoint
    shutil.rmtree(output)
    run_example("continue_training.py", *options, "--resume", "true")
    assert (output / "model.safetensors").read_bytes() == weights


def pretrain(folder, *options):
    """The final rows of a small queue of runs, with the loss by step."""
    packages = [f"{name}=={version(name)}" for name in ("packaging", "filelock")]
    folder.mkdir(exist_ok=True)
    (folder / "packages.txt").write_text("\n# held out\n".join(packages))
    small = ("--layers", 2, "--vocab-size", 400, "--batch-size", 2, "--block-length", 64, "--eval-blocks", 2)
    small += ("--widths", 16, "--tokens-per-parameter", 0.45, "--packages", folder / "packages.txt", "--rates", 1e-3)
    run_example("experiments/pretrain.py", folder, *small, "--output", folder / "losses.jsonl", *options)
    return {
        (row["arm"], row["seed"], row["length"]): {point["step"]: point["loss"] for point in row["losses"]}
        for row in json_lines(folder / "losses.jsonl")
    }


def test_pretrain(tmp_path):
    """
    Base and AttnRes start as one model and see the same batches. A run that was killed, or that shares its first part
    with a run of another length, has the losses of a run on its own.
    """
    arms = ("--arms", "base", "block-sum", "full-mean")
    queue = (*arms, "--lengths", 0.5, 1, 2, "--seeds", 0, 1)
    runs = pretrain(tmp_path / "runs", *queue)
    assert len(runs) == 14 and max(runs["base", 0, 2]) == 40 and max(runs["full-mean", 1, 1]) == 20
    first, last = ([run[step] for (_, _, length), run in sorted(runs.items()) if length == 1] for step in (0, 20))
    assert first[2:4] == pytest.approx(first[:2], abs=1e-5), "with sum scaling AttnRes starts as its base"
    # The queries have moved very little, so the same batches give nearly the same loss
    assert last[2:4] == pytest.approx(last[:2], abs=2e-2) and last[2:4] != pytest.approx(last[:2], abs=1e-6)
    assert first[0] != first[1], "each seed has its own initial weights"
    alone = pretrain(tmp_path / "alone", "--arms", "base", "--lengths", 1, "--seeds", 0)
    assert alone["base", 0, 1] == runs["base", 0, 1]

    # The state of runs that were killed while they wrote a checkpoint
    for checkpoint in (tmp_path / "runs").glob("*/1/checkpoint-18"):
        (checkpoint / "trainer_state.json").unlink()
        shutil.rmtree(checkpoint.with_name("checkpoint-20"))
    output = tmp_path / "runs" / "losses.jsonl"
    rows = output.read_text().splitlines(keepends=True)
    output.write_text("".join(row for row in rows if '"length": 1.0' not in row))
    assert pretrain(tmp_path / "runs", *queue) == runs

    picture = tmp_path / "plot" / "losses.png"
    table = run_example("experiments/plot_pretrain.py", output, "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"| {(last[0] + last[1]) / 2:.4f} ({min(last[:2]):.4f} to {max(last[:2]):.4f}) |" in table


def test_other_reads_start_as_the_base_and_learn_something_else(tmp_path):
    arms = ("base", "block-sum", "block-sum-query16", "block-sum-values")
    runs = pretrain(tmp_path, "--arms", *arms, "--lengths", 1, "--seeds", 0)
    first, last = ([runs[arm, 0, 1][step] for arm in arms] for step in (0, 20))
    assert first == pytest.approx(4 * first[:1], abs=1e-5)
    assert len(set(last)) == 4


def test_retrofits_before_and_after_the_decay(tmp_path):
    pretrain(tmp_path, "--arms", "base", "--lengths", 0.8, 1, "--seeds", 0)
    output = tmp_path / "retrofits.jsonl"
    arms = ("base", "plateau", "queries-first", "finished-base", "finished", "plateau-query16", "plateau-values")
    options = ("--output", output, "--factors", 1, "--arms", *arms)
    run_example("experiments/retrofit_schedule.py", tmp_path, tmp_path / "losses.jsonl", *options)
    runs = {row["arm"]: row["losses"] for row in json_lines(output)}
    first, last = ({arm: losses[i]["loss"] for arm, losses in runs.items()} for i in (0, -1))
    for arm in ("plateau", "plateau-query16", "plateau-values"):
        assert first[arm] == pytest.approx(first["base"], abs=1e-5), "a retrofit starts as its base"
    assert first["finished"] == pytest.approx(first["finished-base"], abs=1e-5)
    assert first["finished"] != pytest.approx(first["base"], abs=1e-5)
    # Queries alone change little in one step, and one of the four steps is theirs
    assert first["queries-first"] == pytest.approx(first["base"], abs=2e-2) and first["queries-first"] != first["base"]
    assert {arm: losses[-1]["step"] for arm, losses in runs.items()} == dict.fromkeys(runs, 4) | {"queries-first": 3}
    assert len(set(last.values())) == len(arms)


def test_the_compute_multiplier():
    """The base needs 1.25 times the tokens of the other arm."""
    from plot_pretrain import multiplier

    def runs(length):
        losses = [2 + 0.7 * length**-0.3 + error for error in (-1e-3, 1e-3)]
        return {seed: {"losses": [{"loss": loss}]} for seed, loss in enumerate(losses)}

    chosen = {(48, length, "base"): runs(length) for length in (0.5, 1.0, 2.0)} | {(48, 1.0, "block"): runs(1.25)}
    value, low, high = multiplier(chosen, 48, 1.0, "block")
    assert value == pytest.approx(1.25, abs=0.01) and 1.2 < low < value < high < 1.3
    del chosen[48, 2.0, "base"]
    assert multiplier(chosen, 48, 1.0, "block") is None


def test_each_arm_at_its_best_setting(tmp_path):
    from plot_training import best, check_conditions, read, table

    def row(arm, seed, rate, final, seconds, **fields):
        losses = [{"step": 0, "loss": 4.0, "seconds": 0.0}, {"step": 9, "loss": final, "seconds": seconds}]
        return {"arm": arm, "seed": seed, "learning_rate": rate, "losses": losses, "seconds": 77, **fields}

    rows = [row("base", seed, 1e-3, final, 10) for seed, final in ((0, 3.0), (1, 3.2))]
    # A base has no block size, so the field is ignored
    rows += [row("base", 0, 1e-2, float("nan"), 10, block_size=4, temperature=None)]
    for size, finals in ((1, (2.0, 2.6)), (2, (1.9,))):
        attn_res = {"attn_res_learning_rate": 1e-4, "block_size": size, "temperature": 4.5}
        rows += [row("attnres", seed, 1e-3, final, 20, **attn_res) for seed, final in enumerate(finals)]
    (tmp_path / "losses.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    arms = read([tmp_path / "losses.jsonl"], ["arm"])
    assert table(arms, {arm: best(arm, arms[arm]) for arm in arms}).splitlines()[2:] == [
        "| base | learning_rate 0.001 | 3.1000 (3.0000 to 3.2000) |  |  |",
        # The losses fall from 4.0 to 2.0 and to 2.6 in 20 seconds, and half as far in 10 seconds
        "| attnres | learning_rate 0.001, attn_res_learning_rate 0.0001, block_size 1 | 2.3000 (2.0000 to 2.6000) | "
        "-0.8000 (-1.0000 to -0.6000) | 0.0500 (0.0000 to 0.1000) |",
    ]

    settings = {arm: best(arm, arms[arm]) for arm in arms}
    check_conditions(settings)
    settings["attnres"] = (*settings["attnres"], ("batch_size", 32))
    with pytest.raises(ValueError, match="differ in 'batch_size'.*'base': None, 'attnres': 32"):
        check_conditions(settings)
    assert list(read([tmp_path / "losses.jsonl"], ["arm", "block_size"])) == ["base", "attnres 1", "attnres 2"]
    del arms["attnres"][best("attnres", arms["attnres"])][0]
    with pytest.raises(ValueError, match="settings of arm 'attnres' have no seed in common"):
        best("attnres", arms["attnres"])


def test_the_noise_of_a_gradient():
    """The gradients of this model are its inputs, so their variance is known."""
    from gradient_noise import noise_scales

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp_res = torch.nn.ParameterDict({"query": torch.zeros(5), "key_norm": torch.zeros(5)})
            self.weight = torch.nn.Parameter(torch.zeros(3, 4))

        def forward(self, x):
            loss = (self.mlp_res["query"] * x[:5]).sum() + (self.weight * x[5:].view(3, 4)).sum()
            return SimpleNamespace(loss=loss + 0 * self.mlp_res["key_norm"].sum())

    inputs = 1.0 + 2 * torch.randn(40, 17, generator=torch.Generator().manual_seed(0))
    scales = noise_scales(Linear(), [{"x": row} for row in inputs], tokens=10)
    assert list(scales) == ["all other parameters", "mlp_res, keys", "mlp_res, query"]
    for group, gradients in (("mlp_res, query", inputs[:, :5]), ("all other parameters", inputs[:, 5:])):
        variance = gradients.var(0, correction=1).sum()
        signal = gradients.mean(0).square().sum() - variance / len(inputs)
        assert scales[group] == pytest.approx((signal.sqrt().item(), (10 * variance / signal).item()), rel=1e-4)
    assert scales["mlp_res, keys"] == (0.0, float("inf"))


def test_which_queries():
    """Without queries, the model computes the loss of its base. With all of them, its own."""
    from which_queries import loss_with

    base = tiny_base("llama")
    model, partly = trained(base), trained(base)
    names = {name for name, module in model.named_modules() if isinstance(module, DepthAttention)}
    attention = {name for name in names if name.endswith("self_attention_res")}
    for name in names - attention:
        torch.nn.init.zeros_(partly.get_submodule(name).query)
    rows = torch.randint(1, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = [each(rows, labels=rows).loss.item() for each in (base, partly, model)]
    assert len({round(loss, 3) for loss in expected}) == 3
    assert [loss_with(kept, model, rows) for kept in (set(), attention, names)] == pytest.approx(expected, abs=1e-5)


def test_benchmark(tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "plot" / "figure.png"
    tiny = ("--size", "tiny", "--sequence", 16, "--rounds", 1)
    output = run_example("experiments/benchmark.py", *tiny, "--output", figures)
    results = json.loads(figures.read_text())["results"]
    names = ["base", "8 blocks", "8 blocks, einsum as published", "8 blocks, fla, naive"]
    rows = [(row["measurement"], row["variant"]) for row in results]
    assert rows == [(measurement, name) for measurement in ("prefill", "decode", "training step") for name in names]
    assert all(len(row["seconds"]) == 1 and row["peak_bytes"] > 0 for row in results)
    assert all(row["variant"] in output for row in results)
    run_example("experiments/plot_benchmark.py", figures, figures, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_models_of_the_benchmark_compute_the_same():
    from benchmark import CUDA_PEERS, PEERS, SIZES, attnres_of
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(**SIZES["tiny"], vocab_size=99)).eval()
    logits = []
    for operator in (None, *PEERS.values(), CUDA_PEERS["plain PyTorch"]):
        torch.manual_seed(0)
        logits.append(attnres_of(base, "2", operator)(torch.arange(20)[None]).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-5)
