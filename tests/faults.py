"""Runs of a function in a forked process, with a fault injected before one of its calls into the operating system."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings

from tqdm import tqdm


FORK = multiprocessing.get_context("fork")


def start_child(function, *arguments):
    receiver, sender = FORK.Pipe(duplex=False)

    def run():
        warnings.simplefilter("ignore")
        # tqdm's own lock is shared between forks: all would wait for a process that is killed with it
        tqdm.set_lock(threading.RLock())
        try:
            sender.send(function(*arguments))
        except Exception as error:  # noqa: BLE001  told to the parent
            sender.send(error)

    process = FORK.Process(target=run)
    process.start()
    sender.close()
    return process, receiver


def end_of(child):
    """The result or the error of the function, or the signal that ended the process."""
    process, receiver = child
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    return result if process.exitcode >= 0 else signal.Signals(-process.exitcode)


def in_child(function, *arguments):
    return end_of(start_child(function, *arguments))


def on_file_calls(callback):
    """
    Calls `callback` before each call that makes, opens, lists, links, renames or removes a file or folder. It starts
    with the first folder that is made. An audit hook cannot be removed, so this is for a child.
    """
    state = {"started": False, "busy": False}

    def hook(event, arguments):
        if event == "open" and not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event != "open" and not event.startswith(("os.", "shutil.")) or state["busy"]:
            return
        state["started"] |= event == "os.mkdir"
        if state["started"]:
            state["busy"] = True
            callback()
            state["busy"] = False

    sys.addaudithook(hook)


def count_calls(function):
    """The number of calls that [`on_file_calls`] sees in the function."""

    def run():
        calls = []
        on_file_calls(lambda: calls.append(None))
        function()
        return len(calls)

    return in_child(run)


def at_call(number, fault, function):
    """Runs the function in a child, and `fault` before its n-th call. Returns as `end_of`."""

    def run():
        calls = iter(range(1, number + 1))
        on_file_calls(lambda: fault() if next(calls, None) == number else None)
        function()

    return in_child(run)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)
