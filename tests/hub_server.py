"""A small Hugging Face Hub in memory. The real ``huggingface_hub`` client uses it through ``HF_ENDPOINT``.

It has model repositories with commits, branches and downloads. It stores all files as the Hub stores small ones.

    with HubServer() as hub:
        hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": weights})
        result = run_python(hub.env(tmp_path, hub.token), code, argument)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Files = dict[str, bytes]


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


class HubServer(ThreadingHTTPServer):
    """The server, a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = "hf_test"  # the only valid one
        self.repos: dict[str, dict[str, Files]] = {}  # the files of each commit
        self.branches: dict[tuple[str, str], str] = {}  # repository and branch to commit
        self.private: set[str] = set()  # repositories that need the token
        self.read_only: set[str] = set()  # owners to whom the token may not write
        self.corrupted: set[tuple[str, str]] = set()  # repository and path that are sent with another last byte
        self.log: list[str] = []  # of all requests

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def env(self, home: str | os.PathLike[str], token: str | None = None, *, offline: bool = False) -> dict[str, str]:
        """Return the environment of a process that uses this server, with the folder ``HF_HOME``."""
        own = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return env | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def add_repo(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit, and the repository if it does not exist, and return the id of the commit."""
        before = self.files(repo, branch) if (repo, branch) in self.branches else {}
        commit = self.branches[repo, branch] = os.urandom(20).hex()
        self.repos.setdefault(repo, {})[commit] = dict(sorted({**before, **files}.items()))
        return commit

    def files(self, repo: str, revision: str = "main") -> Files:
        """Return the content of the files of a repository at a branch or commit, by path."""
        return self.repos[repo][self.branches.get((repo, revision), revision)]

    def count(self, pattern: str) -> int:
        """Return the number of requests ``METHOD PATH`` that match this shell pattern. ``*`` matches ``/``, too."""
        return sum(fnmatchcase(request, pattern) for request in self.log)


class _HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: str) -> None:
        super().__init__(message)
        self.status, self.body = status, json.dumps(body).encode()
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.server.log.append(f"{self.command} {path}")
        status, headers = 200, {}
        try:
            answer = self.answer(path)
            content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        except _HubError as error:
            content, status, headers = error.body, error.status, error.headers
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def answer(self, path: str) -> Any:
        """Return what is sent as JSON, or bytes and headers."""
        match path.split("/")[1:]:
            case ["api", "whoami-v2"]:
                self.check_token()
                return {"type": "user", "name": "tester", "orgs": []}
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["api", "repos", "create"]:
                wanted = json.loads(self.body)
                private = wanted.get("private") or wanted.get("visibility") == "private"
                return self.create(f"{wanted['organization']}/{wanted['name']}", private)
            case ["api", "models", owner, name]:
                return self.of_repo(f"{owner}/{name}", "revision", "main")
            case ["api", "models", owner, name, what, revision]:
                return self.of_repo(f"{owner}/{name}", what, revision)
            case [owner, name, "resolve", revision, file]:
                return self.download(f"{owner}/{name}", revision, file)
        raise _HubError(404, f"This server has no {path}")

    def check_token(self, write_to: str = "", code: str = "") -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise _HubError(401, "Invalid username or password.", code)
        if write_to.split("/")[0] in self.server.read_only:
            raise _HubError(403, f"You don't have the rights to write to {write_to}")

    def find(self, repo: str, revision: str) -> tuple[str, Files]:
        """Return the id and the files of a commit that this request may read."""
        if repo not in self.server.repos or repo in self.server.private:
            # Without this code, the client takes a 401 for a missing repository over https only.
            self.check_token(code="RepoNotFound")
        if repo not in self.server.repos:
            raise _HubError(404, "Repository not found", "RepoNotFound")
        commit = self.server.branches.get((repo, revision), revision)
        if commit not in self.server.repos[repo]:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, self.server.repos[repo][commit]

    def create(self, repo: str, private: bool) -> Any:
        self.check_token(repo)
        url = f"{self.server.url}/{repo}"
        if repo in self.server.repos:
            raise _HubError(409, "You already created this model repo", url=url)
        if private:
            self.server.private.add(repo)
        self.server.add_repo(repo, {".gitattributes": b""})
        return {"url": url}

    def of_repo(self, repo: str, what: str, revision: str) -> Any:
        if what == "branch":
            self.server.branches[repo, revision], _ = self.find(repo, "main")
            return {}
        commit, files = self.find(repo, revision)
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return {"id": repo, "private": repo in self.server.private, "sha": commit, "siblings": siblings}
        if what == "tree":
            return [{"type": "file", "path": p, "size": len(data), "oid": _oid(data)} for p, data in files.items()]
        self.check_token(repo)
        if what == "preupload":
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        assert what == "commit", what
        _, *added = (json.loads(line)["value"] for line in self.body.splitlines())
        oid = self.server.add_repo(repo, {file["path"]: base64.b64decode(file["content"]) for file in added}, revision)
        return {"commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}

    def download(self, repo: str, revision: str, file: str) -> tuple[bytes, dict[str, str]]:
        commit, files = self.find(repo, revision)
        if file not in files:
            raise _HubError(404, "Entry not found", "EntryNotFound")
        data = files[file]
        is_corrupted = (repo, file) in self.server.corrupted
        return data[:-1] + bytes([data[-1] ^ 1]) if is_corrupted else data, {
            "X-Repo-Commit": commit,
            "ETag": f'"{_oid(data)}"',
        }


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
