"""A server in a process of its own on loopback, and a chat with it."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress


@contextmanager
def served(*command, log, timeout=300, **environment):
    """The URL of the server that `command` starts. It receives a port, and is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout
        while not answers(f"{url}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            with suppress(ProcessLookupError):  # its children ended with it
                os.killpg(process.pid, signal.SIGKILL)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def chat(url, model, question, max_tokens, stream=False):
    """The greedy answer to a question."""
    request = {"model": str(model), "messages": [{"role": "user", "content": question}], "temperature": 0}
    from openai import OpenAI  # an optional package

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    answer = client.chat.completions.create(**request, max_tokens=max_tokens, stream=stream)
    if not stream:
        return answer.choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices]
    assert sum(piece != "" for piece in pieces) > 1, "it came at once"
    return "".join(pieces)
