"""The real ``huggingface_hub`` client against `hub_server`.

The client reads its environment when it is imported, so each test runs it in subprocesses.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

REPO = "owner/name"
CHUNK = 10 * 1024 * 1024  # the client writes what it downloads in pieces of this size
PRELUDE = """
import hashlib, json, os, sys
from pathlib import Path
import huggingface_hub as hf
args = json.loads(sys.argv[1])
out = None
def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as problem:
        status = getattr(getattr(problem, "response", None), "status_code", None)
        return {"kinds": [kind.__name__ for kind in type(problem).__mro__], "status": status, "text": str(problem)}
"""


def start(env: dict[str, str], code: str, **args: object) -> subprocess.Popen[str]:
    """Starts the client on some code, which finds `args` and leaves its result in `out`."""
    code = f"{PRELUDE}{code}\nassert 'torch' not in sys.modules or 'timm' in sys.modules\nprint(json.dumps(out))"
    command = [sys.executable, "-c", code, json.dumps(args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Any:
    """The result of a client that was started."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def client(env: dict[str, str], code: str, **args: object) -> Any:
    """Runs the client on some code and returns what it leaves in `out`."""
    return finish(start(env, code, **args))


def sha256(data: bytes) -> str:
    """The hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def content(size: int, seed: int = 0) -> bytes:
    """Bytes without a short period."""
    block = b"".join(hashlib.sha256(f"{seed} {number}".encode()).digest() for number in range(4099))
    return (block * (size // len(block) + 1))[:size]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server; at the end it must not have failed by itself."""
    with HubServer() as server:
        yield server
    assert server.errors == []


PUBLISH = """
url = hf.create_repo(args["repo"], private=True)
commit = hf.upload_folder(repo_id=args["repo"], folder_path=args["folder"], commit_message="first")
again = hf.upload_folder(repo_id=args["repo"], folder_path=args["folder"], commit_message="second")
info = hf.model_info(args["repo"], files_metadata=True)
out = {
    "repo_id": url.repo_id, "commit": commit.oid, "again": again.oid, "sha": info.sha, "private": info.private,
    "files": sorted(hf.list_repo_files(args["repo"])),
    "lfs": {s.rfilename: s.lfs["sha256"] for s in info.siblings if s.lfs},
}
"""
SNAPSHOT = """
folder = Path(hf.snapshot_download(args["repo"], revision=args.get("revision")))
out = {str(p.relative_to(folder)): digest(p) for p in folder.rglob("*") if p.is_file()}
"""
DOWNLOAD = """
path = hf.hf_hub_download(args["repo"], "model.safetensors", revision=args.get("revision"))
out = {"path": path, "sha256": digest(path)}
"""


def test_publish_and_download(hub: HubServer, tmp_path: Path) -> None:
    """create_repo, upload_folder and a clean download."""
    files = {
        "config.json": b'{"a": 1}',
        "README.md": b"---\nlicense: mit\n---\n# name\n",
        "model.safetensors": content(300_000),
        "sub/folder/weights (1).bin": content(5_000, 1),
        "empty.bin": b"",
    }
    for path, data in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(data)
    env = hub.env(tmp_path / "home", hub.token)
    out = client(env, PUBLISH, repo=REPO, folder=str(tmp_path / "folder"))
    assert out["repo_id"] == REPO
    assert out["private"]
    assert REPO in hub.private
    assert out["commit"] == out["again"] == out["sha"] == hub.commits(REPO)[0]
    assert len(hub.commits(REPO)) == 2  # that of create_repo and that of the first upload
    assert out["files"] == sorted([".gitattributes", *files])
    large = ("model.safetensors", "sub/folder/weights (1).bin")
    assert out["lfs"] == {path: sha256(files[path]) for path in large}
    assert {path: hub.files(REPO)[path] for path in files} == files
    assert hub.count("PUT", "/cdn/*") == 2
    assert hub.count("POST", "*/info/lfs/verify") == 2

    there = client(hub.env(tmp_path / "clean", hub.token), SNAPSHOT, repo=REPO)
    assert there == {path: sha256(data) for path, data in hub.files(REPO).items()}
    assert hub.count("GET", "/cdn/owner/name/*") == 2
    assert not any(request.token for request in hub.requests("*", "/cdn/*"))


def test_private_repository(hub: HubServer, tmp_path: Path) -> None:
    """Nothing is there without the token."""
    hub.add_repo(REPO, {"model.safetensors": content(1000)}, private=True)
    code = """
out = [error(hf.model_info, args["repo"]), error(hf.snapshot_download, args["repo"]),
       error(hf.hf_hub_download, args["repo"], "model.safetensors"), error(hf.list_repo_files, args["repo"])]
"""
    for problem in client(hub.env(tmp_path), code, repo=REPO):
        assert problem["kinds"][0] == "RepositoryNotFoundError"
        assert problem["status"] == 401
    assert hub.count("*", "/cdn/*") == 0
    assert client(hub.env(tmp_path, hub.token), DOWNLOAD, repo=REPO)["sha256"] == sha256(content(1000))


def test_what_is_missing(hub: HubServer, tmp_path: Path) -> None:
    """Repository, revision and file each have an error of their own."""
    hub.add_repo(REPO, {"config.json": b"{}"})
    code = """
api = hf.HfApi()
out = [error(hf.model_info, "owner/none"), error(hf.hf_hub_download, "owner/none", "config.json"),
       error(hf.upload_file, repo_id="owner/none", path_or_fileobj=b"1", path_in_repo="a"),
       error(hf.model_info, args["repo"], revision="none"),
       error(hf.hf_hub_download, args["repo"], "config.json", revision="0" * 40),
       error(hf.upload_file, repo_id=args["repo"], path_or_fileobj=b"1", path_in_repo="a", revision="none"),
       error(hf.hf_hub_download, args["repo"], "none.json"),
       [api.repo_exists("owner/none"), api.revision_exists(args["repo"], "main"),
        api.file_exists(args["repo"], "none.json"), api.file_exists(args["repo"], "config.json")]]
"""
    *problems, exists = client(hub.env(tmp_path, hub.token), code, repo=REPO)
    assert [problem["status"] for problem in problems] == [404] * 7
    expected = ["RepositoryNotFoundError"] * 3 + ["RevisionNotFoundError"] * 3 + ["EntryNotFoundError"]
    assert all(kind in problem["kinds"] for kind, problem in zip(expected, problems, strict=True))
    assert exists == [False, True, False, True]
    problem = client(hub.env(tmp_path / "other"), "out = error(hf.model_info, 'owner/none')")
    assert (problem["kinds"][0], problem["status"]) == ("RepositoryNotFoundError", 401)


def test_cut_and_resume(hub: HubServer, tmp_path: Path) -> None:
    """A broken connection: the client goes on where it was, in whole pieces of 10 MiB."""
    data = content(CHUNK + 200_000)
    hub.add_repo(REPO, {"model.safetensors": data})
    hub.cuts.append((CHUNK + 100_000, "*/model.safetensors"))
    again = "for _ in range(2):\n    problem = error(hf.hf_hub_download, args['repo'], 'model.safetensors')\n"
    assert client(hub.env(tmp_path), again + DOWNLOAD, repo=REPO)["sha256"] == sha256(data)
    assert [(r.range, r.status) for r in hub.requests("GET", "/cdn/*")] == [(None, 200), (f"bytes={CHUNK}-", 206)]
    assert hub.cuts == []


def test_corrupted_content(hub: HubServer, tmp_path: Path) -> None:
    """The client compares the size only: it takes other bytes for the file, whose name in the cache is the sha256."""
    data = content(1000)
    hub.add_repo(REPO, {"model.safetensors": data, "config.json": b"{ }"})
    hub.corrupted |= {(REPO, "model.safetensors"), (REPO, "config.json")}
    code = DOWNLOAD + "out['name'] = Path(path).resolve().name\n"
    code += "out['config'] = Path(hf.hf_hub_download(args['repo'], 'config.json')).read_bytes().hex()"
    out = client(hub.env(tmp_path), code, repo=REPO)
    assert out["sha256"] == sha256(data[:-1] + bytes([data[-1] ^ 0xFF]))
    assert out["name"] == sha256(data)
    assert out["config"] == b"{ \x82".hex()
    hub.corrupted.clear()
    assert client(hub.env(tmp_path), DOWNLOAD, repo=REPO)["sha256"] == out["sha256"]  # the cache keeps it
    assert client(hub.env(tmp_path / "clean"), DOWNLOAD, repo=REPO)["sha256"] == sha256(data)
