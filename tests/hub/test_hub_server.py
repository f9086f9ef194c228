"""hub_server answers the real huggingface_hub client as the Hub does."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, run_python

REPO = "owner/name"
PRELUDE = """
import hashlib, json, sys
from pathlib import Path
import huggingface_hub as hf
folder = json.loads(sys.argv[1])
REPO = "owner/name"
def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as problem:
        return [kind.__name__ for kind in type(problem).__mro__], problem.response.status_code
"""


def client(env: dict[str, str], code: str, folder: Path | None = None) -> Any:
    """Run the client in a new process and return `out`."""
    return run_python(env, f"{PRELUDE}{code}\nprint(json.dumps(out))", str(folder))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_upload_and_download(hub: HubServer, tmp_path: Path) -> None:
    files = {
        "config.json": b'{"a": 1}',
        "README.md": b"---\nlicense: mit\n---\n# name\n",
        "model.safetensors": bytes(range(256)) * 1000,
        "sub/folder/weights (1).bin": bytes(range(256)),
        "empty.bin": b"",
    }
    for path, data in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(data)
    code = """
url = hf.create_repo(REPO, private=True)
commit = hf.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
again = hf.upload_folder(repo_id=REPO, folder_path=folder, commit_message="second")
info = hf.model_info(REPO, files_metadata=True)
out = {
    "repo_id": url.repo_id, "commit": commit.oid, "again": again.oid, "sha": info.sha, "private": info.private,
    "files": sorted(hf.list_repo_files(REPO)),
    "lfs": {s.rfilename: s.lfs["sha256"] for s in info.siblings if s.lfs},
}
"""
    out = client(hub.env(tmp_path / "home", hub.token), code, tmp_path / "folder")
    assert out["repo_id"] == REPO
    assert out["private"]
    assert REPO in hub.private
    assert out["commit"] == out["again"] == out["sha"] == hub.commits(REPO)[0]
    assert len(hub.commits(REPO)) == 2, "create_repo and the first upload"
    assert out["files"] == sorted([".gitattributes", *files])
    large = ("model.safetensors", "sub/folder/weights (1).bin")
    assert out["lfs"] == {path: sha256(files[path]) for path in large}
    assert {path: hub.files(REPO)[path] for path in files} == files
    assert hub.count("PUT", "/cdn/*") == hub.count("POST", "*/info/lfs/verify") == 2

    code = """
folder = Path(hf.snapshot_download(REPO))
out = {str(p.relative_to(folder)): digest(p) for p in folder.rglob("*") if p.is_file()}
"""
    downloaded = client(hub.env(tmp_path / "clean", hub.token), code)
    assert downloaded == {path: sha256(data) for path, data in hub.files(REPO).items()}
    assert hub.count("GET", "/cdn/owner/name/*") == 2
    assert not any(request.token for request in hub.requests("*", "/cdn/*"))


def test_private_repository_needs_the_token(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(REPO, {"model.safetensors": b"weights"}, private=True)
    code = """
out = [error(hf.model_info, REPO), error(hf.snapshot_download, REPO), error(hf.list_repo_files, REPO),
       error(hf.hf_hub_download, REPO, "model.safetensors")]
"""
    for kinds, status in client(hub.env(tmp_path), code):
        assert (kinds[0], status) == ("RepositoryNotFoundError", 401)
    assert hub.count("*", "/cdn/*") == 0
    code = "out = digest(hf.hf_hub_download(REPO, 'model.safetensors'))"
    assert client(hub.env(tmp_path, hub.token), code) == sha256(b"weights")
