"""timm-dgconv publish, and checkpoints on the Hub: the real client against hub_server.

The client reads its environment when it is imported, so all commands with a token run in one new process.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from conftest import assert_refused, outputs, trained
from hub_server import HubServer, finish, run_python, start_python
from timm.models import save_for_hf
from torch import nn

from timm_dgconv.cli import main
from timm_dgconv.hub.convert import reload
from timm_dgconv.hub.model import BASELINE

TINY = "test_g_resnext.mine"
DRY_RUN = ["--repo", "owner/name", "--dry-run"]
FILES = ["README.md", "config.json", "groups.png", "model.safetensors"]
COMMANDS = """
import contextlib, io, json, sys
from timm_dgconv.cli import main
results = []
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(args)
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class Hub(NamedTuple):
    """A Hub after some commands. For each command: exit status, output and errors."""

    server: HubServer
    results: dict[str, tuple[int, str, str]]
    folder: Path  # where the commands wrote to


def assert_one_line(result: tuple[int, str, str], *said: str) -> None:
    status, out, error = result
    assert status == 2, out
    assert all(words in error for words in said), error
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return trained(num_classes=11).eval()


@pytest.fixture(scope="module")
def checkpoint(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar"
    torch.save({"state_dict": tiny.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    """A converted folder with one more file."""
    path = checkpoint.with_name("tiny")
    assert main(["convert", str(checkpoint), "--model", TINY, "--out", str(path)]) == 0
    (path / "secret.txt").write_text("not for the Hub")
    return path


@pytest.fixture(scope="module")
def hub(tiny: nn.Module, checkpoint: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    path = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        first = server.add_repo("owner/source", {"model.safetensors": safetensors.torch.save(tiny.state_dict())})
        server.add_repo("owner/source", {"model.safetensors": b"something else"})
        server.add_repo("owner/public", {"config.json": b"{}"})
        save_for_hf(tiny, path / "bin")
        server.add_repo("owner/bin", {file.name: file.read_bytes() for file in (path / "bin").iterdir()})
        server.read_only.add("timm")
        server.corrupted.add(("owner/corrupted", "model.safetensors"))
        file, model = ["publish", str(checkpoint), "--model", TINY, "--repo"], ["--model", TINY]
        publish, convert = ["publish", str(folder), "--repo"], ["--out", str(path / "no"), *model]
        commands = {
            "dry run": [*file, "owner/dry", "--dry-run"],
            "checkpoint": [*file, "owner/tiny"],
            "private": [*publish, "owner/new", "--private", *model],
            "branch": [*publish, "owner/branch", "--revision", "v2"],
            "public": [*publish, "owner/public", "--private"],
            "corrupted": [*publish, "owner/corrupted"],
            "read only": [*publish, "timm/new"],
            "no owner": [*publish, "new"],
            "convert": ["convert", f"hf-hub:owner/source@{first}", "--out", str(path / "converted"), *model],
            "inspect": ["inspect", f"owner/source@{first}", *model],
            "inspect the file": ["inspect", str(checkpoint), *model],
            "inspect bin": ["inspect", "owner/bin", *model],
            "no weights": ["convert", "owner/public", *convert],
            "no revision": ["convert", "owner/public@no", *convert],
        }
        results = run_python(server.env(path / "home", server.token), COMMANDS, list(commands.values()))
        yield Hub(server, dict(zip(commands, results, strict=True)), path)


def test_a_checkpoint_is_converted_and_uploaded(hub: Hub) -> None:
    files = hub.server.files("owner/tiny")
    assert sorted(files) == [".gitattributes", *FILES]
    status, printed, _ = hub.results["checkpoint"]
    assert status == 0
    assert f"{hub.server.url}/owner/tiny" in printed
    for name in FILES:
        line = f"{len(files[name]):,} bytes  sha256 {hashlib.sha256(files[name]).hexdigest()}\n"
        assert re.search(rf"{re.escape(name)} +{re.escape(line)}", printed)
        assert line in hub.results["dry run"][1], "every conversion writes the same files"
    downloads = hub.server.count("GET /owner/tiny/resolve/*/model.safetensors")
    assert downloads == 1, "publish downloads the weights again"


def test_a_dry_run_sends_nothing(hub: Hub) -> None:
    status, printed, _ = hub.results["dry run"]
    assert status == 0
    assert "nothing was sent" in printed
    assert hub.server.count("*owner/dry*") == 0
    assert hub.server.count("GET /api/whoami-v2") == hub.server.count("POST /api/repos/create") == 6


def test_a_private_repository_has_the_files_of_the_model_only(hub: Hub) -> None:
    assert hub.results["private"][0] == 0
    assert "owner/new" in hub.server.private
    assert sorted(hub.server.files("owner/new")) == [".gitattributes", *FILES]
    assert_one_line(hub.results["public"], "owner/public exists and is public, nothing was uploaded")
    assert hub.server.files("owner/public") == {"config.json": b"{}"}


def test_a_revision_is_a_branch(hub: Hub, folder: Path) -> None:
    assert hub.results["branch"][0] == 0
    assert sorted(hub.server.files("owner/branch")) == [".gitattributes"]
    assert hub.server.files("owner/branch", "v2")["config.json"] == (folder / "config.json").read_bytes()
    assert "'hf-hub:owner/branch@v2'" in hub.results["branch"][1]


def test_another_file_on_the_hub_is_noticed(hub: Hub, folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    said = "timm-dgconv publish: the Hub returns another model.safetensors than was uploaded to owner/corrupted"
    assert_one_line(hub.results["corrupted"], said, digest)


def test_a_revision_is_a_source(hub: Hub, tiny: nn.Module) -> None:
    assert hub.results["convert"][0] == 0
    assert torch.equal(outputs(reload(hub.folder / "converted")), outputs(tiny))
    assert hub.results["inspect"] == hub.results["inspect bin"] == hub.results["inspect the file"]
    assert hub.results["inspect"][0] == 0


def test_errors_of_the_hub_are_one_line(hub: Hub) -> None:
    assert_one_line(hub.results["read only"], "timm-dgconv publish: 403", "timm/new", LOG_IN)
    assert_one_line(hub.results["no owner"], "--repo 'new' is not an OWNER/NAME")
    assert_one_line(hub.results["no weights"], "owner/public has no model.safetensors")
    assert_one_line(hub.results["no revision"], "Revision Not Found", "owner/public")
    assert not (hub.folder / "no").exists()


def test_a_missing_connection_or_token_is_one_line(hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish = ["publish", str(folder), "--repo", "owner/new"]
    convert = ["convert", "owner/none", "--model", TINY, "--out", str(tmp_path / "out")]
    unreachable = {**hub.server.env(tmp_path / "1", hub.server.token), "HF_ENDPOINT": "http://127.0.0.1:9"}
    processes = [
        start_python(hub.server.env(tmp_path / "2"), COMMANDS, [publish, convert]),
        start_python(unreachable, COMMANDS, [publish]),
        start_python(hub.server.env(tmp_path / "3", hub.server.token, offline=True), COMMANDS, [publish]),
    ]
    (no_token, none), (refused,), (offline,) = (finish(process) for process in processes)
    assert_one_line(no_token, "timm-dgconv publish: no token for the Hub", LOG_IN)
    assert_one_line(none, "Repository Not Found", "owner/none", LOG_IN)
    assert_one_line(refused, "Connection refused")
    assert_one_line(offline, "HF_HUB_OFFLINE is set")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.json": None}, "has no config.json; use a folder that timm-dgconv convert wrote"),
        ({"model.safetensors": None}, "has no model.safetensors"),
        ({"config.json": b"{}"}, "timm cannot load"),
    ],
)
def test_a_damaged_folder_is_refused(change: dict[str, bytes | None], said: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        data = change.get(path.name, path.read_bytes())
        if data is not None:
            (tmp_path / path.name).write_bytes(data)
    assert_refused(["publish", str(tmp_path), *DRY_RUN], said)


def test_a_wrong_model_name_is_refused(folder: Path, checkpoint: Path) -> None:
    assert_refused(["publish", str(checkpoint), *DRY_RUN], "is not a folder", "or --model ARCH.TAG")
    assert_refused(["publish", str(folder), *DRY_RUN, "--model", BASELINE], f"is {TINY}, not {BASELINE}")
