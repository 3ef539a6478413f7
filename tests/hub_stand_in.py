"""A small Hub on loopback: what huggingface_hub asks of it to make a repository, upload to it and download from it."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_stand_in"
USER = "someone"
MODEL_ID = r"[\w.-]+(/[\w.-]+)?"


class HubStandIn(ThreadingHTTPServer):
    """
    Repositories with one branch, which every revision names. Weights go the way of LFS, other files into the commit.

    Attributes:
        repositories (`dict[str, dict[str, bytes]]`): files by path, of each repository.
        private (`set[str]`): the repositories that only the token's owner may read.
        objects (`dict[str, bytes]`): what LFS holds, by sha256.
        received (`list[str]`): the sha256 of each object that was sent, in order.
        served (`list[tuple[str, str]]`): repository and path of each file that was downloaded.
        commits (`list[tuple[str, str]]`): repository and summary of each commit.
        hold (`threading.Event`, *optional*): an object that comes after the first waits for it.
        waiting (`threading.Event`): set when one does.
        refuse_objects (`bool`): answer 403 to each object.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.private, self.objects = {}, set(), {}
        self.received, self.served, self.commits = [], [], []
        self.hold, self.waiting, self.refuse_objects = None, threading.Event(), False

    def environment(self, cache, token=TOKEN):
        """Of a process that has this Hub and no other."""
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        # xet is a service of its own
        own |= {"HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb"}
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def sha(self, repository):
        """The commit that all revisions name."""
        files = self.repositories[repository]
        content = "".join(f"{path} {etag(files[path])}" for path in sorted(files))
        return hashlib.sha1(content.encode()).hexdigest()

    def handle_error(self, request, client_address):
        """A client that went away in the midst of a request is what a test wants to see."""


@contextmanager
def running_hub():
    server = HubStandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def etag(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer_json({"name": USER, "type": "user"}) if self.is_owner() else self.refuse(401)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+|/tree/.+)?", path):
            repository, what = match.groups()
            if not self.may_read(repository):
                return self.refuse(404, "RepoNotFound")
            files = self.server.repositories[repository]
            if what and what.startswith("/tree"):
                tree = [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in sorted(files.items())]
                return self.answer_json(tree)
            siblings = [{"rfilename": path} for path in sorted(files)]
            info = {"id": repository, "sha": self.server.sha(repository), "siblings": siblings}
            return self.answer_json({**info, "private": repository in self.server.private})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repository, file = match.groups()
            if not self.may_read(repository):
                return self.refuse(404, "RepoNotFound")
            if file not in self.server.repositories[repository]:
                return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": self.server.sha(repository)})
            if self.command == "GET":
                self.server.served.append((repository, file))
            content = self.server.repositories[repository][file]
            headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": self.server.sha(repository)}
            return self.answer(200, content, headers)
        return self.refuse(404)

    do_HEAD = do_GET

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            data = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            bases = data.get("base_model") or []
            wrong = [b for b in ([bases] if isinstance(bases, str) else bases) if not re.fullmatch(MODEL_ID, b)]
            errors = [{"message": f'"base_model" with value "{base}" is not valid.'} for base in wrong]
            return self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if not self.is_owner():
            return self.refuse(401)
        if path == "/api/repos/create":
            request = json.loads(body)
            repository = f"{request.get('organization') or USER}/{request['name']}"
            url = {"url": f"{self.server.endpoint}/{repository}"}
            if repository in self.server.repositories:
                return self.answer_json(url, 409)
            self.server.repositories[repository] = {}
            if request.get("private") or request.get("visibility") == "private":
                self.server.private.add(repository)
            return self.answer_json(url)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = self.server.repositories[match[1]]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": etag(files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer_json({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}
                known = wanted["oid"] in self.server.objects
                objects.append({**wanted, **({} if known else {"actions": upload})})
            return self.answer_json({"objects": objects, "transfer": "basic"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            repository = match[1]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.commits.append((repository, value["summary"]))
                elif line["key"] == "file":
                    self.server.repositories[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.repositories[repository][value["path"]] = self.server.objects[value["oid"]]
            sha = self.server.sha(repository)
            url = f"{self.server.endpoint}/{repository}/commit/{sha}"
            return self.answer_json({"success": True, "commitOid": sha, "commitUrl": url})
        return self.refuse(404)

    def do_PUT(self):
        oid = urlsplit(self.path).path.removeprefix("/lfs/")
        if self.server.refuse_objects:
            self.body()
            return self.refuse(403)
        content = self.body()
        if self.server.hold is not None and self.server.received:
            self.server.waiting.set()
            self.server.hold.wait()
            return self.refuse(403)
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.received.append(oid)
        self.server.objects[oid] = content
        return self.answer(200, b"")

    def is_owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_read(self, repository):
        return repository in self.server.repositories and (repository not in self.server.private or self.is_owner())

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer_json(self, content, status=200):
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code=None, headers=()):
        self.answer(status, b"{}", {**dict(headers), **({"X-Error-Code": code} if code else {})})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass
