"""A source on the Hub: against a stand-in on loopback that answers what `snapshot_download` asks."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from test_cli import attnres
from test_conversion import save_base, tensor_hashes


REPO, COMMIT = "someone/base", "0123456789abcdef0123456789abcdef01234567"


def etag(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """Serves a base checkpoint, and much that a retrofit has no use for, as the tag `v1` of a repository."""
    folder = save_base(tmp_path / "hub")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not for us")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    served = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if path == f"/api/models/{REPO}/revision/v1":
                siblings = [{"rfilename": name} for name in files]
                return self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
            if path == f"/api/models/{REPO}/tree/{COMMIT}":
                tree = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in files.items()]
                return self.answer(json.dumps(tree).encode())
            name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if name not in files:
                return self.send_error(404)
            if self.command == "GET":
                served.append(name)
            return self.answer(files[name])

        do_HEAD = do_GET

        def answer(self, body):
            self.send_response(200)
            self.send_header("ETag", f'"{etag(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, served
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("link", [[], ["--link"]], ids=["copy", "link"])
def test_a_hub_id_and_a_revision(hub, link, tmp_path):
    endpoint, folder, served = hub
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"},
    }
    result = attnres("retrofit", REPO, tmp_path / "attnres", "--revision", "v1", *link, environment=environment)
    assert result.returncode == 0, result.stderr
    base_hashes, hashes = tensor_hashes(folder), tensor_hashes(tmp_path / "attnres")
    assert {name: hashes[name] for name in base_hashes} == base_hashes
    card = (tmp_path / "attnres" / "README.md").read_text()
    assert f"base_model: {REPO}" in card and f"https://huggingface.co/{REPO}" in card
    assert not any(path.is_symlink() for path in (tmp_path / "attnres").rglob("*"))
    assert {"config.json", "model.safetensors", "LICENSE", "tokenizer.json"} <= set(served)
    assert not {"pytorch_model.bin", "original/consolidated.00.pth"} & set(served), "only the files needed"
