"""A server in a process of its own on loopback, and what asks it as OpenAI's clients do."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress


@contextmanager
def served(*command, log, timeout=300, **environment):
    """The URL of what `command` serves; it is given a port, and ended at the end."""
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
            with suppress(ProcessLookupError):  # what it started ended with it
                os.killpg(process.pid, signal.SIGKILL)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def chat(url, model, question, max_tokens, stream=False):
    """The greedy answer to a question, by way of `/v1/chat/completions`."""
    body = {
        **{"model": str(model), "messages": [{"role": "user", "content": question}], "stream": stream},
        **{"max_tokens": max_tokens, "temperature": 0},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        if not stream:
            return json.load(response)["choices"][0]["message"]["content"]
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.startswith(b"data: ")]
    chunks = [json.loads(line)["choices"] for line in lines if line != "[DONE]"]
    pieces = [choices[0]["delta"].get("content") or "" for choices in chunks if choices]
    assert sum(piece != "" for piece in pieces) > 1, "it came at once"
    return "".join(pieces)
