"""The `attnres` command as a user types it."""

import json
import os
import re
import resource
import sys
from importlib.metadata import version

import pytest
from helpers import attnres, file_bytes, invoke_attnres, save_base


def test_there_and_back(tmp_path):
    base = save_base(tmp_path / "base")
    options = ("--type", "block", "--block-size", 2, "--scale", "sum", "--norm-eps", "1e-5", "--link")
    retrofit = attnres("retrofit", base, tmp_path / "attnres", *options)
    assert retrofit.returncode == 0, retrofit.stderr
    assert "llama, 5 layers, block (3 blocks of 2 decoder layers), 640 new parameters" in retrofit.stdout
    assert f" It computes the same as its base.\nNext: attnres verify {base} {tmp_path / 'attnres'}" in retrofit.stdout
    config = json.loads((tmp_path / "attnres" / "config.json").read_text())
    assert config["attn_res_block_size"] == 2 and config["attn_res_norm_eps"] == 1e-5

    verify = invoke_attnres("verify", base, tmp_path / "attnres")
    assert verify.exit_code == 0, verify.stderr
    numbers = re.search(r"^Same: largest difference (\S+), largest logit (\S+) \((\S+) of it, 1e-05", verify.stdout)
    difference, logit, ratio = map(float, numbers.groups())
    assert 0 < difference < 1e-5 * logit and ratio < 1e-5

    module = (sys.executable, "-m", "modeling_attnres.conversion")
    revert = attnres("revert", tmp_path / "attnres", tmp_path / "reverted", command=module)
    assert revert.returncode == 0, revert.stderr
    assert file_bytes(tmp_path / "reverted") == file_bytes(base)


def test_a_read_for_the_values(tmp_path):
    base, output = save_base(tmp_path / "base"), tmp_path / "attnres"
    retrofit = invoke_attnres("retrofit", base, output, "--type", "full", "--value-read")
    assert "full (each sublayer's output), separate read for the values, 896 new parameters" in retrofit.stdout
    assert invoke_attnres("verify", base, output).exit_code == 0
    # As the card says it was made
    command = re.search(r"`attnres (retrofit .*)`", (output / "README.md").read_text())[1]
    again = command.replace("retrofit base OUTPUT", f"retrofit {base} {tmp_path / 'again'}").split()
    assert invoke_attnres(*again).exit_code == 0
    assert (tmp_path / "again" / "config.json").read_bytes() == (output / "config.json").read_bytes()
    assert invoke_attnres("revert", output, tmp_path / "reverted").exit_code == 0
    assert file_bytes(tmp_path / "reverted") == file_bytes(base)


def test_a_retrofit_that_differs_says_so(tmp_path):
    base = save_base(tmp_path / "base")
    mean = invoke_attnres("retrofit", base, tmp_path / "mean", "--scale", "mean")
    assert "It differs from its base (scale 'mean')" in mean.stdout and "verify" not in mean.stdout
    different = invoke_attnres("verify", base, tmp_path / "mean")
    assert different.exit_code == 1 and different.stdout.startswith("Different: ")


@pytest.mark.parametrize(
    "command, exit_code, message",
    [
        ("retrofit nothing out", 1, "Error: nothing is not a local folder, not in the Hub cache"),
        ("retrofit base base", 1, "Error: .*base exists already and is not an empty folder"),
        ("retrofit base out --block-size 0", 1, "Error: `attn_res_block_size` is 0"),
        ("retrofit base out --type blocks", 2, "Error: .*'block', 'full'"),
        ("verify base base", 1, "Error: .*base is not an AttnRes checkpoint"),
        ("revert base out", 1, "Error: .*base is not an AttnRes checkpoint"),
    ],
)
def test_an_error_is_one_line(command, exit_code, message, tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    result = invoke_attnres(*command.split())
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == exit_code and re.match(message, error)
    assert os.listdir() == ["base"]


@pytest.mark.parametrize("command", ["", "retrofit", "verify", "revert", "merge", "card", "inspect", "push"])
def test_help_comes_at_once(command):
    """In under half a second of processor time, since the machine has other work too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = attnres(*command.split(), "--help", env={"COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "Example: attnres " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version_and_completion():
    assert attnres("--version").stdout == f"modeling-attnres {version('modeling-attnres')}\n"
    completion = {"_ATTNRES_COMPLETE": "complete_bash", "COMP_WORDS": "attnres re", "COMP_CWORD": "1"}
    assert attnres(env=completion).stdout.split() == ["retrofit", "revert"]
