"""A small Hub on loopback. It has the routes that huggingface_hub needs to make, fill and read a repository."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
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
    # Called for each object that arrives
    accepts_object: Callable[[], bool] = lambda: True

    def environment(self, cache, token=TOKEN):
        """Of a process that has this Hub and no other."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        # xet is a service of its own
        return {**own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}

    def sha(self, repository):
        """The commit that all revisions name."""
        return sha1(repr(sorted(self.repositories[repository].items())).encode())


def sha1(content):
    return hashlib.sha1(content).hexdigest()


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


def app_of(hub):
    app = FastAPI()

    def is_owner(request: Request):
        return request.headers.get("Authorization") == f"Bearer {TOKEN}"

    IsOwner = Annotated[bool, Depends(is_owner)]

    def check_owner(is_owner: IsOwner):
        if not is_owner:
            raise HTTPException(401)

    def readable_files(repository: str, is_owner: IsOwner):
        if repository not in hub.repositories or (repository in hub.private and not is_owner):
            raise HTTPException(404, headers={"X-Error-Code": "RepoNotFound"})
        return hub.repositories[repository]

    owner_only = [Depends(check_owner)]
    Files = Annotated[dict, Depends(readable_files)]

    @app.get("/api/whoami-v2", dependencies=owner_only)
    def whoami():
        return {"name": USER, "type": "user"}

    @app.get("/api/models/{repository:path}/tree/{revision}")
    @app.get("/api/models/{repository:path}/tree/{revision}/{folder:path}")
    def tree(files: Files, folder: str = ""):
        inside = [(path, content) for path, content in sorted(files.items()) if path.startswith(folder)]
        return [{"type": "file", "path": path, "size": len(c), "oid": sha1(c)} for path, c in inside]

    @app.get("/api/models/{repository:path}/revision/{revision}")
    def model_info(repository, files: Files):
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = repository in hub.private
        return {"id": repository, "sha": hub.sha(repository), "siblings": siblings, "private": private}

    # After the longer paths, which it matches too
    app.get("/api/models/{repository:path}")(model_info)

    @app.api_route("/{repository:path}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(repository, path, request: Request, files: Files):
        headers = {"X-Repo-Commit": hub.sha(repository)}
        if path not in files:
            raise HTTPException(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        if request.method == "GET":
            hub.served.append(path)
        return Response(files[path], headers={**headers, "ETag": f'"{sha1(files[path])}"'})

    @app.post("/api/validate-yaml")
    def validate_yaml():
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create", dependencies=owner_only)
    def create(fields: dict):
        repository = f"{fields.get('organization') or USER}/{fields['name']}"
        is_known = repository in hub.repositories
        hub.repositories.setdefault(repository, {})
        if not is_known and (fields.get("private") or fields.get("visibility") == "private"):
            hub.private.add(repository)
        return JSONResponse({"url": f"{hub.endpoint}/{repository}"}, 409 if is_known else 200)

    @app.post("/api/models/{repository:path}/preupload/{revision}", dependencies=owner_only)
    def preupload(fields: dict):
        modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in fields["files"]}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    @app.post("/{repository:path}.git/info/lfs/objects/batch", dependencies=owner_only)
    def batch(fields: dict):
        for wanted in fields["objects"]:
            if wanted["oid"] not in hub.objects:
                wanted["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}
        content = {"objects": fields["objects"], "transfer": "basic"}
        return JSONResponse(content, media_type="application/vnd.git-lfs+json")

    @app.put("/lfs/{oid}")
    async def upload(oid, request: Request):
        content = await request.body()
        if not hub.accepts_object() or hashlib.sha256(content).hexdigest() != oid:
            raise HTTPException(403)
        hub.received.append(oid)
        hub.objects[oid] = content

    @app.post("/api/models/{repository:path}/commit/{revision}", dependencies=owner_only)
    async def commit(repository, request: Request):
        files = hub.repositories[repository]
        for line in map(json.loads, (await request.body()).splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        hub.commits.append(repository)
        sha = hub.sha(repository)
        return {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repository}/commit/{sha}"}

    return app
