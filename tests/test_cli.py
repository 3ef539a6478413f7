"""The `attnres` command as a user types it."""

import os
import re
import subprocess
import time

from test_conversion import file_bytes, save_base


# A terminal wide enough for a message, without colours in the midst of it
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def attnres(*arguments, environment=ENVIRONMENT):
    return subprocess.run(["attnres", *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_there_and_back(tmp_path):
    base = save_base(tmp_path / "base")
    (base / "pytorch_model.bin").unlink()
    retrofit = attnres(
        *("retrofit", base, tmp_path / "attnres", "--type", "block", "--block-size", 2, "--scale", "sum"),
        *("--norm-eps", "1e-5", "--link"),
    )
    assert retrofit.returncode == 0, retrofit.stderr
    assert "attnres verify" in retrofit.stdout

    verify = attnres("verify", base, tmp_path / "attnres")
    assert verify.returncode == 0, verify.stderr
    numbers = re.search(r"Largest difference (\S+), largest logit (\S+): (\S+) of it, 1e-05 allowed", verify.stdout)
    difference, logit, ratio = map(float, numbers.groups())
    assert 0 < difference < 1e-5 * logit and ratio < 1e-5

    revert = attnres("revert", tmp_path / "attnres", tmp_path / "reverted")
    assert revert.returncode == 0, revert.stderr
    assert file_bytes(tmp_path / "reverted") == file_bytes(base)


def test_exits_with_1_and_one_line_where_something_is_wrong(tmp_path):
    base = save_base(tmp_path / "base")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    attnres("retrofit", base, tmp_path / "mean", "--scale", "mean")
    for arguments, message in [
        (("retrofit", tmp_path / "nothing", tmp_path / "out"), "neither a local folder nor a Hub id"),
        (("retrofit", base, tmp_path / "taken"), "exists already and is not an empty folder"),
        (("retrofit", base, tmp_path / "out", "--block-size", 9), "`attn_res_block_size` is 9"),
        (("verify", base, base), "is not AttnRes"),
        (("verify", base, tmp_path / "mean"), "The two compute different things."),
        (("revert", base, tmp_path / "out"), "is not an AttnRes checkpoint"),
    ]:
        result = attnres(*arguments)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert "Verification" not in (tmp_path / "mean" / "README.md").read_text()


def test_an_unknown_value_is_a_usage_error(tmp_path):
    result = attnres("retrofit", "a", "b", "--type", "blocks")
    assert result.returncode == 2 and "'block', 'full'" in result.stderr


def test_help_comes_at_once():
    """In under half a second, so without torch; the best of several, since the machine has other work too."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        result = attnres("--help")
        times.append(time.perf_counter() - start)
        assert result.returncode == 0 and all(word in result.stdout for word in ("retrofit", "verify", "revert"))
    assert min(times) < 0.5
