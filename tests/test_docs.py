"""README and model cards are run as they stand; what needs ImageNet is parsed by the script that it names.

The examples of docstrings run as doctests.
"""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_server import HubServer
from PIL import Image

import timm_dgconv
from timm_dgconv.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CARDS = sorted(ROOT.glob("hub_configs/*/README.md"))
SCRIPTS = os.environ.get("TIMM_SCRIPTS_DIR")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = (line.partition("  #")[0] for block in blocks(page, "bash") for line in block.splitlines())
    return [command.strip() for line in lines for command in line.split("&&")]


def named(program: str) -> list[str]:
    """The commands of the README that run this program."""
    return [command for command in commands(README) if command.split()[0] == program]


def run(codes: list[str], env: dict[str, str], before: str = "") -> list[str]:
    """What each prints, one after the other in a new process."""
    each = """
import contextlib, io, json, sys
*codes, before = json.loads(sys.stdin.read())
exec(before)
outputs = []
for code in codes:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, code, "exec"), {})
    outputs.append(output.getvalue())
print(json.dumps(outputs))
"""
    command, given = [sys.executable, "-c", each], json.dumps([*codes, before])
    result = subprocess.run(command, input=given, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment with a Hub that has what README and cards load, with other weights."""
    with HubServer() as server:
        resnext = timm.create_model("resnext50_32x4d")
        weights = safetensors.torch.save(resnext.state_dict())
        server.add_repo("timm/resnext50_32x4d.a1h_in1k", {"model.safetensors": weights})
        for name in ("g_resnext50.dgconv_in1k", "resnext50_32x4d.dgconv_in1k"):
            config = (ROOT / "hub_configs" / name / "config.json").read_bytes()
            server.add_repo(f"OWNER/{name}", {"config.json": config, "model.safetensors": weights})
        yield server.env(tmp_path_factory.mktemp("home"))
    assert server.errors == []


def test_readme(hub: dict[str, str]) -> None:
    run(blocks(README, "python"), hub)


@pytest.mark.parametrize("name", ["g_resnext50", "resnext50_32x4d"])
def test_model_card(name: str, hub: dict[str, str], tmp_path: Path) -> None:
    """With another image in place of the one on the Hub."""
    codes = blocks(ROOT / "hub_configs" / f"{name}.dgconv_in1k" / "README.md", "python")
    Image.new("RGB", (320, 240), "white").save(tmp_path / "image.png")
    urlopen = (
        f"import urllib.request\nurllib.request.urlopen = lambda url: open({str(tmp_path / 'image.png')!r}, 'rb')\n"
    )
    printed = run(codes, hub, before=urlopen)
    assert len(printed) == 3
    for code, output in zip(codes, printed, strict=True):
        assert output.splitlines() == re.findall(r"#  (torch\.Size.*)", code)


def test_model_card_of_g_resnext101() -> None:
    """The code of that of g_resnext50, whose weights are a third."""
    large, small = (
        blocks(ROOT / "hub_configs" / f"g_resnext{n}.dgconv_in1k" / "README.md", "python") for n in (101, 50)
    )
    assert [code.replace("g_resnext101", "g_resnext50") for code in large] == small


def test_our_commands(
    original: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the README, on files with the names that it uses."""
    monkeypatch.chdir(tmp_path)
    Path("g_resnext50.pth.tar").symlink_to(original[0])
    run_folder = Path("output/train/RUN")
    run_folder.mkdir(parents=True)
    torch.manual_seed(0)
    state_dict = timm.create_model("g_resnext50").state_dict()
    for name in ("model_best", "checkpoint-0", "checkpoint-1"):
        torch.save(
            {"epoch": int(name[-1]) if name[-1].isdigit() else 1, "state_dict": state_dict},
            f"{run_folder}/{name}.pth.tar",
        )
    done = []
    for command in named("timm-dgconv"):
        args = [str(path) for arg in shlex.split(command)[1:] for path in ([*sorted(Path().glob(arg))] or [arg])]
        if args[0] in ("demo", "bench") or (args[0] == "publish" and "--dry-run" not in args):
            continue  # test_demo, test_cli and test_hub run these
        if args[0] == "convert" and Path(args[args.index("--out") + 1]).exists():
            continue
        assert main(args) == 0, command
        done.append(args[0])
    assert set(done) == {"convert", "inspect", "publish"}
    assert Path("groups.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_demo(tmp_path: Path) -> None:
    (command,) = (command for command in named("timm-dgconv") if "demo" in command)
    subprocess.run([Path(sys.executable).with_name("timm-dgconv"), *shlex.split(command)[1:]], cwd=tmp_path, check=True)


def test_extras() -> None:
    asked = {extra for command in commands(README) for extra in re.findall(r"\[([\w,]+)\]", command)}
    known = set(importlib.metadata.metadata("timm-dgconv").get_all("Provides-Extra") or [])
    assert {extra for several in asked for extra in several.split(",")} <= known
    assert {"demo", "test"} <= asked


@pytest.mark.skipif(SCRIPTS is None, reason="TIMM_SCRIPTS_DIR is not set to a checkout of timm's repository")
def test_timm_scripts_take_the_flags() -> None:
    code = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import timm
for command in json.loads(sys.argv[2]):
    place = next(n for n, word in enumerate(command) if word.endswith(".py"))
    args = importlib.import_module(command[place].removesuffix(".py")).parser.parse_args(command[place + 1 :])
    timm.create_model(args.model, device="meta", **args.model_kwargs)
"""
    scripts = [shlex.split(command) for command in named("python") + named("torchrun")]
    assert {word for words in scripts for word in words if word.endswith(".py")} == {"train.py", "validate.py"}
    assert SCRIPTS is not None
    subprocess.run([sys.executable, "-c", code, SCRIPTS, json.dumps(scripts)], check=True)


def test_every_command_is_known() -> None:
    """A program that no test here looks at is no program that the README may name."""
    programs = {command.split()[0] for page in (README, *CARDS) for command in commands(page)}
    assert programs <= {"pip", "pytest", "python", "timm-dgconv", "torchrun", "nox"}


@pytest.mark.parametrize("name", timm_dgconv.__all__)
def test_public_names_have_an_example(name: str) -> None:
    documented: Any = getattr(timm_dgconv, name)
    assert ">>> " in documented.__doc__
