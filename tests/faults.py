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


def with_fault(function, number=0, fault=None):
    """
    Runs the function in a child, and `fault` before its n-th call that makes, opens, lists, links, renames or removes a
    file or folder, from the first folder that is made. Returns the number of these calls, or the end as `end_of`.
    """

    def run():
        calls, is_busy = 0, False

        def hook(event, arguments):
            nonlocal calls, is_busy
            if event == "open":
                is_file_call = isinstance(arguments[0], (str, bytes, os.PathLike))
            else:
                is_file_call = event.startswith(("os.", "shutil."))
            if is_busy or not is_file_call or calls == 0 and event != "os.mkdir":
                return
            calls += 1
            if calls == number:
                is_busy = True
                fault()
                is_busy = False

        # It cannot be removed, so this is for a child
        sys.addaudithook(hook)
        function()
        return calls

    return in_child(run)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)
