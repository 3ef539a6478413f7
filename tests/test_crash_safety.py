"""A retrofit or revert that is killed, or loses its disk or its source, leaves a whole output or none."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
from test_conversion import file_bytes, save_base, tensor_hashes
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from modeling_attnres.conversion import retrofit, revert, verify


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts a small disk and reads /proc")

# Calls into the operating system, from the first folder made on
BOUNDARIES = {"mkdir", "open", "write", "sendfile", "__exit__", "chmod", "link", "rename", "unlink", "rmdir"}


def start_child(function, *arguments):
    """Runs it in a fork of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")
            # tqdm's own lock is shared between forks: all would wait for a process that is killed with it
            tqdm.set_lock(threading.RLock())
            try:
                answer = repr(function(*arguments))
            except BaseException as error:  # noqa: BLE001  told to the parent
                answer = f"{type(error).__name__}: {error}"
            sys.setprofile(None)
            os.write(writer, answer.encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    return pid, reader


def end_of(child):
    """The signal that ended it, or 0, and what it returned or raised."""
    pid, reader = child
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read().decode()
    return os.waitpid(pid, 0)[1], answer


def in_child(function, *arguments):
    return end_of(start_child(function, *arguments))


def at_boundary(number, fault, function, *arguments):
    """Runs `function`, and `fault` before its n-th call into the operating system. Returns how many it made."""
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        if event == "c_call" and argument.__name__ in BOUNDARIES and (calls or argument.__name__ == "mkdir"):
            calls += 1
            if calls == number:
                sys.setprofile(None)
                fault()
                sys.setprofile(profile)

    sys.setprofile(profile)
    function(*arguments)
    sys.setprofile(None)
    return calls


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def linked(source, output):
    return retrofit(source, output, link=True)


class Work:
    """An operation with its source, its output, and the bytes that both have to have."""

    def __init__(self, folder, operation=retrofit, **base):
        self.folder, self.operation = folder, operation
        self.source, self.output = folder / "source", folder / "output"
        folder.mkdir()
        save_base(self.source, num_hidden_layers=2, **base)
        (self.source / "pytorch_model.bin").unlink()
        if operation is revert:
            retrofit(self.source, folder / "attnres")
            shutil.rmtree(self.source)
            (folder / "attnres").rename(self.source)
        self.before = file_bytes(self.source)
        # Also imports whatever the children would import
        operation(self.source, self.output)
        AutoModelForCausalLM.from_pretrained(self.output)
        if operation is not revert:
            assert verify(self.source, self.output).passed
        self.expected = file_bytes(self.output)
        shutil.rmtree(self.output)

    def run(self):
        self.operation(self.source, self.output)

    def check(self, killed=False):
        """All or nothing. Returns whether it was all."""
        assert file_bytes(self.source) == self.before, "the source is unchanged"
        names = {path.name for path in self.folder.iterdir() if not (killed and path.name.endswith(".partial"))}
        assert names in ({"source"}, {"source", "output"})
        if done := "output" in names:
            assert file_bytes(self.output) == self.expected
            shutil.rmtree(self.output)
        return done

    def run_again(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run()
        assert self.check(killed=True)
        for partial in self.folder.glob(".output.*.partial"):
            shutil.rmtree(partial)

    def put_back_source(self):
        shutil.rmtree(self.source, ignore_errors=True)
        for name, content in self.before.items():
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            (self.source / name).write_bytes(content)


@pytest.fixture(params=[retrofit, revert], ids=["retrofit", "revert"])
def work(request, tmp_path):
    return Work(tmp_path / "work", request.param, sharded=True)


def kill_at_every_boundary(work, every=1):
    """Each run also shows that what the killed ones left is in nobody's way."""
    signals, number, finished = [signal.SIGKILL], 0, 0
    while signals[-1] == signal.SIGKILL:
        number += every
        signals.append(in_child(at_boundary, number, kill, work.run)[0])
        finished += work.check(killed=True)
    assert signals[-1] == 0 and finished >= 1, "the last one came through"
    work.run_again()
    return number - every


def test_killed_at_the_boundaries(work):
    assert kill_at_every_boundary(work, every=9) > 50


def kill_at_random_moments(work, count, seed=0):
    """Returns how many of the killed runs had got as far as an output."""
    start = time.perf_counter()
    assert in_child(work.run) == (0, "None")
    duration = time.perf_counter() - start
    assert work.check()
    moments, finished = random.Random(seed), 0
    for _ in range(count):
        child = start_child(work.run)
        time.sleep(moments.uniform(0, 1.1 * duration))
        os.kill(child[0], signal.SIGKILL)
        end_of(child)
        finished += work.check(killed=True)
    work.run_again()
    return finished


def test_killed_at_random_moments(work):
    kill_at_random_moments(work, 10)


def test_what_a_killed_run_left_is_pointed_out(tmp_path):
    work = Work(tmp_path / "work")
    in_child(at_boundary, 10, kill, work.run)
    with pytest.warns(UserWarning, match=r"\.output\..*\.partial is from a killed run"):
        work.run()


def fault_at_every_boundary(work, fault, errors, every=1):
    """Returns how many runs failed; the others had read what they needed."""
    boundaries = int(in_child(at_boundary, 0, None, work.run)[1])
    assert work.check()
    failed = 0
    for number in range(1, boundaries + 1, every):
        _, answer = in_child(at_boundary, number, fault, work.run)
        work.put_back_source()
        done = work.check()
        assert done == answer.isdecimal() and (done or answer.startswith(errors)), answer
        failed += not done
    return failed


VANISHED = ("FileNotFoundError", "ValueError: ")


def test_the_source_vanishes(work):
    def vanish():
        shutil.rmtree(work.source)

    assert fault_at_every_boundary(work, vanish, VANISHED, every=9) > 2


def test_the_source_is_cut_short_meanwhile(work):
    def cut():
        for shard in work.source.glob("*.safetensors"):
            os.truncate(shard, shard.stat().st_size - 8)

    assert fault_at_every_boundary(work, cut, ("ValueError",), every=5) > 0


@pytest.mark.parametrize("operation", [retrofit, linked, revert])
def test_the_source_is_written_to_meanwhile(operation, tmp_path):
    """All of it, with other bytes, as many as before: files of two versions would fit together."""
    work = Work(tmp_path / "work", operation, sharded=True)
    originals = tensor_hashes(work.source)

    def write():
        for shard in work.source.glob("*.safetensors"):
            # As saving does: another file by that name
            shutil.copy(shard, shard.with_suffix(".new"))
            with shard.with_suffix(".new").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x7f")
            shard.with_suffix(".new").replace(shard)

    boundaries = int(in_child(at_boundary, 0, None, work.run)[1])
    assert work.check()
    answers = []
    for number in range(1, boundaries, 5):
        answers.append(in_child(at_boundary, number, write, work.run)[1])
        if work.output.exists():
            hashes, changed = tensor_hashes(work.output), tensor_hashes(work.source)
            assert answers[-1].isdecimal()
            assert any(all(hashes.get(n, v) == v for n, v in version.items()) for version in (originals, changed))
            shutil.rmtree(work.output)
        else:
            assert answers[-1].startswith("ValueError") and "changed while it was copied" in answers[-1]
        work.put_back_source()
        assert work.check() is False
    assert any(answer.startswith("ValueError") for answer in answers)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: a tmpfs."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_the_disk_is_full(work, disk):
    """From no room at all to enough: an error, and the disk as empty as before."""
    errors = 0
    for pages in range(1, 400, 2):
        remount(disk, f"size={pages * 4}k")
        try:
            work.operation(work.source, disk / "output")
        except OSError as error:
            assert "No space left on device" in str(error)
            assert not any(disk.iterdir())
            errors += 1
        else:
            break
        assert file_bytes(work.source) == work.before
    assert errors >= 5 and file_bytes(disk / "output") == work.expected


def test_the_disk_is_read_only(work, disk):
    remount(disk, "ro")
    with pytest.raises(OSError, match="Read-only file system.*disk"):
        work.operation(work.source, disk / "output")
    remount(disk, "rw,size=8m")
    work.operation(work.source, disk / "output")
    assert file_bytes(disk / "output") == work.expected and file_bytes(work.source) == work.before


def race(work, runs=2):
    """Several at once into one output. Returns what each said."""
    reader, writer = os.pipe()

    def run():
        os.close(writer)
        # All wait until nobody holds the other end any more
        os.read(reader, 1)
        work.run()
        return "won"

    children = [start_child(run) for _ in range(runs)]
    os.close(writer)
    os.close(reader)
    return [end_of(child)[1] for child in children]


def test_of_two_at_once_one_wins_and_the_other_says_so(work):
    for _ in range(6):
        answers = sorted(race(work), reverse=True)
        assert answers[0].startswith(("FileExistsError: The output", "OSError: ")) and answers[1] == "'won'", answers
        assert work.check(), "and nothing is left of the loser"
