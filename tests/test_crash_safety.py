"""A retrofit or revert that is killed, or loses its disk or its source, leaves a whole output or none."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from faults import FORK, end_of, in_child, kill, start_child, with_fault
from helpers import file_bytes, save_base, tensor_hashes

from modeling_attnres.conversion import retrofit, revert


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and mounts a small disk")


def linked_retrofit(source, output):
    return retrofit(source, output, link=True)


class Work:
    """An operation with its source, its output, and the bytes that both have to have."""

    def __init__(self, folder, operation):
        self.folder, self.operation = folder / "work", operation
        self.source, self.output = self.folder / "source", self.folder / "output"
        self.original = save_base(folder / "base", sharded=True, num_hidden_layers=2)
        if operation is revert:
            self.original = retrofit(self.original, folder / "retrofit")
        self.put_back_source()
        self.before, self.tensors = file_bytes(self.source), tensor_hashes(self.source)
        # Also imports what the children would import
        self.run()
        self.expected = file_bytes(self.output)
        shutil.rmtree(self.output)

    def run(self):
        self.operation(self.source, self.output)

    def take_output(self, killed=False):
        """Checks that there is a whole output or none, removes it, and returns whether there was one."""
        assert file_bytes(self.source) == self.before, "the source is unchanged"
        names = {path.name for path in self.folder.iterdir() if not (killed and path.name.endswith(".partial"))}
        assert names in ({"source"}, {"source", "output"})
        if is_whole := "output" in names:
            assert file_bytes(self.output) == self.expected
            shutil.rmtree(self.output)
        return is_whole

    def put_back_source(self):
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.original, self.source)


@pytest.fixture(params=[retrofit, linked_retrofit, revert])
def work(request, tmp_path):
    return Work(tmp_path, request.param)


def test_killed_before_any_call(work, thorough):
    """The remains of one killed run do not disturb the next."""
    count = with_fault(work.run)
    assert count > 50 and work.take_output()
    for number in range(1, count + 1, 1 if thorough else 9):
        assert with_fault(work.run, number, kill) == signal.SIGKILL
        work.take_output(killed=True)
    with pytest.warns(UserWarning, match=r"\.output\..*\.partial is from a killed run"):
        work.run()
    assert work.take_output(killed=True)


def test_killed_at_a_random_moment(work, thorough):
    start = time.perf_counter()
    in_child(work.run)
    assert work.take_output()
    duration, moments = time.perf_counter() - start, random.Random(0)
    for _ in range(60 if thorough else 10):
        child = start_child(work.run)
        time.sleep(moments.uniform(0, 1.1 * duration))
        child[0].kill()
        end_of(child)
        work.take_output(killed=True)


def truncate(source):
    for shard in source.glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size - 8)


def save_over(source):
    """Each shard is replaced by one of the same size with other values, as saving does."""
    for shard in source.glob("*.safetensors"):
        content = shard.read_bytes()
        shard.with_suffix(".new").write_bytes(content[:-1] + b"\x7f")
        shard.with_suffix(".new").replace(shard)


@pytest.mark.parametrize("change, step", [(shutil.rmtree, 9), (truncate, 5), (save_over, 5)])
def test_the_source_changes_meanwhile(change, step, work, thorough):
    """Before any call: an output with the tensors of one version, or an error and no output."""
    if work.operation is linked_retrofit and change is truncate:
        pytest.skip("a linked output shrinks with its source")
    count, errors = with_fault(work.run), []
    assert work.take_output()
    for number in range(1, count + 1, 1 if thorough else step):
        result = with_fault(work.run, number, lambda: change(work.source))
        if type(result) is not int:
            assert isinstance(result, (ValueError, OSError) if change is shutil.rmtree else ValueError), result
            assert change is not save_over or "changed while it was copied" in str(result)
            errors.append(result)
        elif change is save_over:
            output, new = tensor_hashes(work.output).items(), tensor_hashes(work.source).items()
            assert any(output >= version or output <= version for version in (work.tensors.items(), new))
            shutil.rmtree(work.output)
        work.put_back_source()
        assert work.take_output() == (change is not save_over and result not in errors)
    assert errors


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: a tmpfs."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("operation", [retrofit, revert])
def test_the_disk_is_read_only_or_full(operation, disk, tmp_path):
    """From no room at all to enough: an error, and the disk as empty as before."""

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)

    work, errors = Work(tmp_path / "work", operation), 0
    remount("ro")
    with pytest.raises(OSError, match="Read-only file system.*disk"):
        operation(work.source, disk / "output")
    for pages in range(1, 400, 2):
        remount(f"rw,size={pages * 4}k")
        try:
            operation(work.source, disk / "output")
            break
        except OSError as error:
            assert "No space left on device" in str(error) and not any(disk.iterdir())
            errors += 1
    assert errors >= 5 and file_bytes(disk / "output") == work.expected and file_bytes(work.source) == work.before


def test_of_several_runs_at_once_one_wins_and_the_others_say_so(work):
    def run(barrier):
        barrier.wait()
        work.run()

    for _ in range(6):
        barrier = FORK.Barrier(3)
        children = [start_child(run, barrier) for _ in range(3)]
        errors = [error for error in map(end_of, children) if error is not None]
        assert len(errors) == 2 and all(isinstance(error, OSError) for error in errors)
        assert work.take_output(), "and nothing is left of the losers"
