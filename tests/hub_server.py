"""A small Hugging Face Hub in memory. The real ``huggingface_hub`` client uses it through ``HF_ENDPOINT``.

It has model repositories with commits, branches, Git LFS, listings, and downloads with ETags. Large files are
redirected to a second address, the CDN. It has no Xet, pull requests, tags, byte ranges or ``.gitignore`` rules.

    with HubServer() as hub:
        hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": weights})
        result = run_python(hub.env(tmp_path, hub.token), code, argument)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote

LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".h5", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def start_python(env: dict[str, str], code: str, argument: object = None) -> subprocess.Popen[str]:
    """Start code in a new process. It has the argument in ``sys.argv[1]`` and prints its result last, both as JSON."""
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}  # an old timm in a new torch warns
    command = [sys.executable, "-c", code, json.dumps(argument)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Any:
    """Return the result of a process that `start_python` started."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def run_python(env: dict[str, str], code: str, argument: object = None) -> Any:
    """Run code in a new process and return its result, see `start_python`."""
    return finish(start_python(env, code, argument))


@dataclass
class Request:
    method: str
    path: str  # decoded, without the query; the content of LFS files is under /cdn/owner/name/
    token: str | None
    query: dict[str, list[str]] = field(default_factory=dict, repr=False)
    groups: dict[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)  # only until the request is answered


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class _HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Blob:
    """The content of a file, and its ids in Git and Git LFS."""

    def __init__(self, data: bytes, lfs: bool) -> None:
        self.data, self.size, self.lfs, self.sha256 = data, len(data), lfs, hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        stored = pointer if lfs else data
        self.oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        self.pointer_size = len(pointer)

    def entry(self, path: str) -> dict[str, Any]:  # the two listings of the Hub use different names
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        names = {"type": "file", "path": path, "rfilename": path, "size": self.size}
        return {**names, "oid": self.oid, "blobId": self.oid, **({"lfs": lfs} if self.lfs else {})}


class _Repo:
    def __init__(self, repo_id: str) -> None:
        self.id = repo_id
        self.commits: dict[str, dict[str, _Blob]] = {}
        self.branches: dict[str, list[str]] = {"main": []}  # ids of the commits, newest last
        self.uploaded: dict[str, _Blob] = {}  # LFS content by sha256

    def find(self, revision: str) -> tuple[str, dict[str, _Blob]]:
        commit = self.branches[revision][-1] if revision in self.branches else revision
        if commit not in self.commits:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, dict(sorted(self.commits[commit].items()))

    def commit(self, branch: str, title: str, tree: dict[str, _Blob]) -> str:
        listing = [f"{path} {blob.oid}" for path, blob in sorted(tree.items())]
        text = f"{self.id} {title} {listing} {self.branches[branch][-1:]} {os.urandom(8).hex()}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = tree
        self.uploaded |= {blob.sha256: blob for blob in tree.values() if blob.lfs}
        self.branches[branch].append(oid)
        return oid


class HubServer:
    """The server, a context manager that raises at its end if the server had an error of its own."""

    def __init__(self) -> None:
        self.token, self.user = "hf_test", "tester"  # the only valid token, and its account
        self.log: list[Request] = []  # oldest first
        self.errors: list[str] = []  # tracebacks of the server's own errors, each answered with a status 501
        self.private: set[str] = set()  # repositories that need the token
        self.read_only: set[str] = set()  # namespaces to which the token may not write (403)
        self.corrupted: set[tuple[str, str]] = set()  # (repository, path): sent with another last byte, same ETag
        self._lock = threading.RLock()
        self._secret = os.urandom(16).hex()
        self._repos: dict[str, _Repo] = {}
        self._listeners = [_Listener(("127.0.0.1", 0), _Handler) for _ in range(2)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)

    def __enter__(self) -> HubServer:
        for listener in self._listeners:
            listener.hub = self
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
        assert not self.errors, self.errors

    def env(self, home: str | os.PathLike[str], token: str | None = None, *, offline: bool = False) -> dict[str, str]:
        """Return the environment of a process that uses this server, with the folder ``HF_HOME``."""
        own = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return env | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False) -> str:
        """Add a commit, and the repository if it does not exist, and return the id of the commit."""
        with self._lock:
            repo = self._repos.setdefault(repo_id, _Repo(repo_id))
            self.private |= {repo_id} if private else set()
            tree = repo.find("main")[1] if repo.branches["main"] else {}
            new = {path: _Blob(bytes(data), _is_lfs(path, len(data))) for path, data in files.items()}
            return repo.commit("main", "add_repo", tree | new)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the content of the files of a repository at a branch or commit, by path."""
        return {path: blob.data for path, blob in self._repos[repo_id].find(revision)[1].items()}

    def commits(self, repo_id: str, branch: str = "main") -> list[str]:
        """Return the ids of the commits of a branch, newest first."""
        return self._repos[repo_id].branches[branch][::-1]

    def count(self, method: str = "*", path: str = "*") -> int:
        """Return the number of requests whose method and path match these shell patterns. ``*`` matches ``/``, too."""
        return sum(fnmatchcase(r.method, method) and fnmatchcase(r.path, path) for r in list(self.log))

    def _answer(self, request: Request, raw_path: str) -> Reply:
        try:
            for methods, pattern, action in _ROUTES:
                match = pattern.fullmatch(raw_path)
                if match and request.method in methods:
                    request.groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                    with self._lock:
                        return action(self, request)
            raise _HubError(404, f"This server has no {request.method} {request.path}")
        except _HubError as error:
            return _json({"error": str(error)}, error.status, error.headers)
        except Exception:  # the client repeats a request after a 500, but not after a 501
            self.errors.append(traceback.format_exc())
            return _json({"error": self.errors[-1]}, 501)

    def _check(self, request: Request, write_to: str = "", code: str = "", *, needed: bool = True) -> None:
        if request.token not in (None, f"Bearer {self.token}"):
            raise _HubError(401, "Invalid credentials in Authorization header")
        if needed and request.token is None:
            raise _HubError(401, "Invalid username or password.", code)
        if write_to.split("/")[0] in self.read_only:
            raise _HubError(403, f"You don't have the rights to write to {write_to}")

    def _repo(self, request: Request, *, write: bool = False) -> _Repo:
        repo_id = request.groups["repo"]
        private = repo_id not in self._repos or repo_id in self.private
        # Without this code, the client takes a 401 for a missing repository over https only.
        self._check(request, repo_id if write else "", "RepoNotFound", needed=write or private)
        if repo_id not in self._repos:
            raise _HubError(404, "Repository not found", "RepoNotFound")
        return self._repos[repo_id]

    def _whoami(self, request: Request) -> Reply:
        self._check(request)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def _create(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._check(request, repo_id)
        if repo_id in self._repos:
            return _json({"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.add_repo(repo_id, {".gitattributes": _ATTRIBUTES}, private=private)
        return _json({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def _info(self, request: Request) -> Reply:
        repo = self._repo(request)
        commit, tree = repo.find(request.groups["rev"] or "main")
        siblings = [blob.entry(p) if "blobs" in request.query else {"rfilename": p} for p, blob in tree.items()]
        info = {"id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "private": repo.id in self.private}
        return _json({**info, "gated": False, "tags": [], "sha": commit, "siblings": siblings})

    def _tree(self, request: Request) -> Reply:  # recursive, as the client requests it
        return _json([blob.entry(path) for path, blob in self._repo(request).find(request.groups["rev"])[1].items()])

    def _branch(self, request: Request) -> Reply:
        repo, name = self._repo(request, write=True), request.groups["rev"]
        if name in repo.branches:
            raise _HubError(409, f"Reference already exists: refs/heads/{name}")
        start = json.loads(request.body).get("startingPoint") or "main"
        repo.branches[name] = repo.branches.get(start, [repo.find(start)[0]])[:]
        return _json({"success": True})

    def _preupload(self, request: Request) -> Reply:
        tree = self._repo(request, write=True).find(request.groups["rev"])[1]
        files: list[dict[str, Any]] = []
        for path, size in ((file["path"], file["size"]) for file in json.loads(request.body)["files"]):
            lfs = _is_lfs(path, size)
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if path in tree:  # the client does not commit files that are there
                files[-1]["oid"] = tree[path].sha256 if lfs else _Blob(tree[path].data, False).oid
        return _json({"files": files})

    def _lfs_batch(self, request: Request) -> Reply:
        repo = self._repo(request, write=True)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(request.body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repo.uploaded:
                upload = {"href": self._cdn_link("PUT", repo.id, wanted["oid"], "upload"), "header": {}}
                verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/verify"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, request: Request) -> Reply:
        wanted, uploaded = json.loads(request.body), self._repo(request, write=True).uploaded
        if wanted["oid"] not in uploaded or uploaded[wanted["oid"]].size != wanted["size"]:
            raise _HubError(404, f"No object {wanted['oid']} of {wanted['size']} bytes was uploaded.")
        return _json({"message": "ok"})

    def _commit(self, request: Request) -> Reply:
        repo, branch = self._repo(request, write=True), request.groups["rev"]
        head, tree = repo.find(branch)
        if branch not in repo.branches or "create_pr" in request.query:
            raise _HubError(400, "This server commits to branches only.")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", head) != head:
            raise _HubError(412, "A commit has happened since. Please refresh and try again.")
        for kind, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"]
            if kind == "file":
                data = base64.b64decode(value["content"])
                tree[path] = _Blob(data, _is_lfs(path, len(data)))
            elif kind == "lfsFile" and value["oid"] in repo.uploaded:
                tree[path] = repo.uploaded[value["oid"]]
            elif kind == "deletedFile" and path in tree:
                del tree[path]
            else:
                raise _HubError(400, f"Cannot commit {kind} {path}: no such file, or it was not uploaded.")
        oid = repo.commit(branch, header["value"]["summary"], tree)
        return _json({"commitOid": oid, "commitUrl": f"{self.url}/{repo.id}/commit/{oid}", "pullRequestUrl": None})

    def _resolve(self, request: Request) -> Reply:
        repo, path = self._repo(request), request.groups["path"]
        commit, tree = repo.find(request.groups["rev"])
        if path not in tree:
            raise _HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        blob = tree[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"'}
        if not blob.lfs:
            return self._content(repo.id, path, blob, headers)
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(blob.size)}
        return Reply(b"", 302, headers | {"Location": self._cdn_link("GET", repo.id, blob.sha256, path)})

    def _content(self, repo_id: str, path: str, blob: _Blob, headers: dict[str, str]) -> Reply:
        data = blob.data
        if (repo_id, path) in self.corrupted:
            data = data[:-1] + bytes(byte ^ 0xFF for byte in data[-1:])
        return Reply(data, 200, headers | {"Content-Type": "application/octet-stream"})

    def _cdn_link(self, method: str, repo_id: str, oid: str, path: str) -> str:
        sign = hashlib.sha256(f"{self._secret} {method} {repo_id} {oid}".encode()).hexdigest()[:16]
        return f"{self.cdn_url}/cdn/{repo_id}/{oid}/{quote(path)}?sign={sign}"

    def _cdn(self, request: Request) -> Reply:
        repo_id, oid, path = (request.groups[name] for name in ("repo", "oid", "path"))
        link = self._cdn_link("PUT" if request.method == "PUT" else "GET", repo_id, oid, path)
        if request.token is not None or not link.endswith("?sign=" + request.query.get("sign", [""])[0]):
            raise _HubError(403, "Only a signed link opens this address, and no token may come here.")
        uploaded = self._repos[repo_id].uploaded
        if request.method == "PUT":
            blob = _Blob(request.body, True)
            if blob.sha256 != oid:
                raise _HubError(400, f"The content does not have the sha256 {oid}.")
            uploaded[oid] = blob
            return Reply()
        return self._content(repo_id, path, uploaded[oid], {"ETag": f'"{oid}"'})


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10 * 1024 * 1024)


def _route(route: str, action: Callable[..., Reply]) -> tuple[list[str], re.Pattern[str], Callable[..., Reply]]:
    methods, path = route.replace("REPO", "(?P<repo>[^/]+/[^/]+)").replace("REV", "(?P<rev>[^/]+)").split(" ")
    return methods.split(","), re.compile(path.replace("PATH", "(?P<path>.+)")), action


_ROUTES = [
    _route("GET /api/whoami-v2", HubServer._whoami),
    _route("POST /api/validate-yaml", lambda hub, request: _json({"errors": [], "warnings": []})),
    _route("POST /api/repos/create", HubServer._create),
    _route("GET /api/models/REPO(?:/revision/REV)?", HubServer._info),
    _route("GET /api/models/REPO/tree/REV", HubServer._tree),
    _route("POST /api/models/REPO/branch/REV", HubServer._branch),
    _route("POST /api/models/REPO/preupload/REV", HubServer._preupload),
    _route("POST /api/models/REPO/commit/REV", HubServer._commit),
    _route(r"POST /REPO\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    _route(r"POST /REPO\.git/info/lfs/verify", HubServer._lfs_verify),
    _route("GET,HEAD /REPO/resolve/REV/PATH", HubServer._resolve),
    _route("GET,HEAD,PUT /cdn/REPO/(?P<oid>[0-9a-f]{64})/PATH", HubServer._cdn),
]


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, *args: object) -> None: ...

    def _handle(self) -> None:
        hub, (raw_path, _, query) = self.server.hub, self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization")
        request = Request(self.command, unquote(raw_path), token, query=parse_qs(query), body=body)
        hub.log.append(request)
        reply = hub._answer(request, raw_path)
        request.body = b""
        try:
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle
