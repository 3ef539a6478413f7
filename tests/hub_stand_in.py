"""A small Hub on loopback. It has the routes that huggingface_hub needs to make, fill and read a repository."""

import asyncio
import base64
import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse


TOKEN = "hf_stand_in"
USER = "someone"


@dataclass
class HubStandIn:
    """
    Repositories with one branch, which every revision names. Weights go the way of LFS, other files into the commit.
    Repositories are named `owner/name`, and an object in LFS by its sha256.
    """

    endpoint: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    # Those that only the token's owner may read
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    # Objects that were sent, paths that were downloaded and repositories that were committed to, in order
    received: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    refuse_objects: bool = False
    # An object that comes after the first sets `waiting` and waits for `hold`
    hold: threading.Event | None = None
    waiting: threading.Event = field(default_factory=threading.Event)

    def environment(self, cache, token=TOKEN):
        """Of a process that has this Hub and no other."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        # xet is a service of its own
        return {**own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}

    def sha(self, repository):
        """The commit that all revisions name."""
        files = self.repositories[repository]
        return hashlib.sha1("".join(f"{path} {etag(files[path])}" for path in sorted(files)).encode()).hexdigest()

    def check_owner(self, request):
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401)

    def files(self, request, repository):
        """The files of a repository. An error if the sender of the request may not read it."""
        try:
            if repository in self.private:
                self.check_owner(request)
            return self.repositories[repository]
        except (HTTPException, KeyError):
            raise HTTPException(404, headers={"X-Error-Code": "RepoNotFound"}) from None


@contextmanager
def running_hub():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub = HubStandIn(f"http://127.0.0.1:{listener.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(app_of(hub), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield hub
        server.should_exit = True
        thread.join()


def etag(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def app_of(hub):
    app = FastAPI()

    @app.get("/api/whoami-v2")
    def whoami(request: Request):
        hub.check_owner(request)
        return {"name": USER, "type": "user"}

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    def model_info(owner, name, request: Request):
        repository = f"{owner}/{name}"
        siblings = [{"rfilename": path} for path in sorted(hub.files(request, repository))]
        private = repository in hub.private
        return {"id": repository, "sha": hub.sha(repository), "siblings": siblings, "private": private}

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    def tree(owner, name, request: Request):
        files = sorted(hub.files(request, f"{owner}/{name}").items())
        return [{"type": "file", "path": path, "size": len(c), "oid": etag(c)} for path, c in files]

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(owner, name, path, request: Request):
        files = hub.files(request, f"{owner}/{name}")
        headers = {"X-Repo-Commit": hub.sha(f"{owner}/{name}")}
        if path not in files:
            raise HTTPException(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        if request.method == "GET":
            hub.served.append(path)
        return Response(files[path], headers={**headers, "ETag": f'"{etag(files[path])}"'})

    @app.post("/api/validate-yaml")
    def validate_yaml():
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create")
    async def create(request: Request):
        hub.check_owner(request)
        fields = await request.json()
        repository = f"{fields.get('organization') or USER}/{fields['name']}"
        is_known = repository in hub.repositories
        hub.repositories.setdefault(repository, {})
        if not is_known and (fields.get("private") or fields.get("visibility") == "private"):
            hub.private.add(repository)
        return JSONResponse({"url": f"{hub.endpoint}/{repository}"}, 409 if is_known else 200)

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner, name, request: Request):
        hub.check_owner(request)
        known = hub.repositories[f"{owner}/{name}"]
        modes = []
        for path in [file["path"] for file in (await request.json())["files"]]:
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = etag(known[path]) if path in known else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": modes}

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request):
        hub.check_owner(request)
        objects = (await request.json())["objects"]
        for wanted in objects:
            if wanted["oid"] not in hub.objects:
                wanted["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}
        return JSONResponse({"objects": objects, "transfer": "basic"}, media_type="application/vnd.git-lfs+json")

    @app.put("/lfs/{oid}")
    async def upload(oid, request: Request):
        content = await request.body()
        if hub.hold is not None and hub.received:
            hub.waiting.set()
            await asyncio.to_thread(hub.hold.wait)
            raise HTTPException(403)
        if hub.refuse_objects or hashlib.sha256(content).hexdigest() != oid:
            raise HTTPException(403)
        hub.received.append(oid)
        hub.objects[oid] = content

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner, name, request: Request):
        hub.check_owner(request)
        repository = f"{owner}/{name}"
        for line in map(json.loads, (await request.body()).splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.repositories[repository][value["path"]] = hub.objects[value["oid"]]
        hub.commits.append(repository)
        sha = hub.sha(repository)
        return {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repository}/commit/{sha}"}

    return app
