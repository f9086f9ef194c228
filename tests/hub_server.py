"""A small Hugging Face Hub in memory. The real ``huggingface_hub`` client uses it through ``HF_ENDPOINT``.

It has model repositories with commits, branches, listings, and downloads with ETags. It stores all files as the Hub
stores small ones, without Git LFS or Xet.

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
from urllib.parse import unquote


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
    path: str  # decoded, without the query
    token: str | None
    body: bytes
    groups: dict[str, str] = field(default_factory=dict)  # of the pattern of its route


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


class _Repo:
    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, list[str]] = {"main": []}  # ids of the commits, newest last

    def find(self, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = self.branches[revision][-1] if revision in self.branches else revision
        if commit not in self.commits:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, dict(sorted(self.commits[commit].items()))

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        oid = os.urandom(20).hex()
        self.commits[oid] = tree
        self.branches[branch].append(oid)
        return oid


class HubServer:
    """The server, a context manager that raises at its end if the server had an error of its own."""

    def __init__(self) -> None:
        self.token, self.user = "hf_test", "tester"  # the only valid token, and its account
        self.private: set[str] = set()  # repositories that need the token
        self.read_only: set[str] = set()  # namespaces to which the token may not write (403)
        self.corrupted: set[tuple[str, str]] = set()  # (repository, path): sent with another last byte, same ETag
        self._log: list[tuple[str, str]] = []  # method and path of all requests
        self._errors: list[str] = []  # tracebacks of the server's own errors, each answered with a status 501
        self._lock = threading.RLock()
        self._repos: dict[str, _Repo] = {}
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> HubServer:
        self._listener.hub = self
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        assert not self._errors, self._errors

    def env(self, home: str | os.PathLike[str], token: str | None = None, *, offline: bool = False) -> dict[str, str]:
        """Return the environment of a process that uses this server, with the folder ``HF_HOME``."""
        own = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return env | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def add_repo(self, repo_id: str, files: Mapping[str, bytes]) -> str:
        """Add a commit, and the repository if it does not exist, and return the id of the commit."""
        with self._lock:
            repo = self._repos.setdefault(repo_id, _Repo())
            tree = repo.find("main")[1] if repo.branches["main"] else {}
            return repo.commit("main", tree | dict(files))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the content of the files of a repository at a branch or commit, by path."""
        return self._repos[repo_id].find(revision)[1]

    def commits(self, repo_id: str) -> list[str]:
        """Return the ids of the commits of the main branch, oldest first."""
        return self._repos[repo_id].branches["main"]

    def count(self, method: str, path: str) -> int:
        """Return the number of requests whose method and path match these shell patterns. ``*`` matches ``/``, too."""
        return sum(fnmatchcase(m, method) and fnmatchcase(p, path) for m, p in list(self._log))

    def answer(self, request: Request) -> Reply:
        self._log.append((request.method, request.path))
        try:
            for methods, pattern, action in _ROUTES:
                match = pattern.fullmatch(request.path)
                if match and request.method in methods:
                    request.groups = match.groupdict("")
                    with self._lock:
                        return action(self, request)
            raise _HubError(404, f"This server has no {request.method} {request.path}")
        except _HubError as error:
            return _json({"error": str(error)}, error.status, error.headers)
        except Exception:  # the client repeats a request after a 500, but not after a 501
            self._errors.append(traceback.format_exc())
            return _json({"error": self._errors[-1]}, 501)

    def _check(self, request: Request, write_to: str = "", code: str = "", *, needed: bool = True) -> None:
        if needed and request.token != f"Bearer {self.token}":
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
        return _json({"type": "user", "name": self.user, "orgs": []})

    def _create(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._check(request, repo_id)
        if repo_id in self._repos:
            return _json({"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}, 409)
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.private.add(repo_id)
        self.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return _json({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def _info(self, request: Request) -> Reply:
        commit, tree = self._repo(request).find(request.groups["rev"] or "main")
        repo_id, siblings = request.groups["repo"], [{"rfilename": path} for path in tree]
        return _json({"id": repo_id, "private": repo_id in self.private, "sha": commit, "siblings": siblings})

    def _tree(self, request: Request) -> Reply:  # recursive, as the client requests it
        tree = self._repo(request).find(request.groups["rev"])[1].items()
        return _json([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in tree])

    def _branch(self, request: Request) -> Reply:
        repo = self._repo(request, write=True)
        repo.branches[request.groups["rev"]] = repo.branches["main"][:]
        return _json({"success": True})

    def _preupload(self, request: Request) -> Reply:
        tree = self._repo(request, write=True).find(request.groups["rev"])[1]
        paths = [file["path"] for file in json.loads(request.body)["files"]]
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        # The client does not commit files that are there.
        return _json({"files": [{"path": p, **mode, **({"oid": _oid(tree[p])} if p in tree else {})} for p in paths]})

    def _commit(self, request: Request) -> Reply:
        repo, branch = self._repo(request, write=True), request.groups["rev"]
        tree = repo.find(branch)[1]
        _, *operations = (json.loads(line) for line in request.body.splitlines())
        for operation in operations:
            assert operation["key"] == "file"
            tree[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        oid = repo.commit(branch, tree)
        return _json({"commitOid": oid, "commitUrl": f"{self.url}/{request.groups['repo']}/commit/{oid}"})

    def _resolve(self, request: Request) -> Reply:
        path = request.groups["path"]
        commit, tree = self._repo(request).find(request.groups["rev"])
        if path not in tree:
            raise _HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        data, headers = tree[path], {"X-Repo-Commit": commit, "ETag": f'"{_oid(tree[path])}"'}
        if (request.groups["repo"], path) in self.corrupted:
            data = data[:-1] + bytes(byte ^ 0xFF for byte in data[-1:])
        return Reply(data, 200, headers)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


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
    _route("GET,HEAD /REPO/resolve/REV/PATH", HubServer._resolve),
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
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, token = unquote(self.path.partition("?")[0]), self.headers.get("Authorization")
        reply = self.server.hub.answer(Request(self.command, path, token, body))
        try:
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = _handle
