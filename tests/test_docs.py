"""The examples and commands of the README, the pages in docs/ and the model cards work.

The Python blocks of a page run as they are, as one program. Commands that need ImageNet are parsed by timm's scripts.
Docstrings run as doctests.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import Capture, Original, Patch
from hub_server import HubServer, run_python
from PIL import Image

from timm_dgconv.cli import main

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = (README, *sorted(ROOT.glob("docs/*.md")))
DEPLOY = ROOT / "docs" / "deploy.md"
CARDS = sorted(ROOT.glob("hub_configs/*/README.md"))
SCRIPTS = os.environ.get("TIMM_SCRIPTS_DIR")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def deploy_programs() -> dict[str, str]:
    """The programs of the page about deployment by their first import. Those of timm and torch make the model."""
    tools = {code: re.split(r"[ .\n]", code, maxsplit=2)[1] for code in blocks(DEPLOY, "python")}
    return {f"{tool} int8" if "int8" in code else tool: code for code, tool in tools.items()}


def commands(page: Path) -> list[str]:
    lines = (line.partition("  #")[0] for block in blocks(page, "bash") for line in block.splitlines())
    return [command.strip() for line in lines for command in line.split("&&")]


def named(program: str, *pages: Path) -> list[str]:
    """The commands of these pages, or of README and docs/, that run this program."""
    found = [command for page in pages or PAGES for command in commands(page) if command.split()[0] == program]
    return list(dict.fromkeys(found))


RUN = """
import contextlib, io, json, sys, urllib.request
*codes, image = json.loads(sys.argv[1])
urllib.request.urlopen = lambda url: open(image, "rb")
outputs = []
for code in codes:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, code, "exec"), {})
    outputs.append(output.getvalue())
print(json.dumps(outputs))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Hub with the models that the README and the cards load, with random weights."""
    with HubServer() as server:
        resnext = timm.create_model("resnext50_32x4d", zero_init_last=False)
        weights = safetensors.torch.save(resnext.state_dict())
        server.add_repo("timm/resnext50_32x4d.a1h_in1k", {"model.safetensors": weights})
        for name in ("g_resnext50.dgconv_in1k", "resnext50_32x4d.dgconv_in1k"):
            config = (ROOT / "hub_configs" / name / "config.json").read_bytes()
            server.add_repo(f"OWNER/{name}", {"config.json": config, "model.safetensors": weights})
        yield server.env(tmp_path_factory.mktemp("home"))


def test_the_code_of_all_pages_runs(hub: dict[str, str], tmp_path: Path) -> None:
    """Each page is one program."""
    programs = ["\n".join(blocks(page, "python")) for page in PAGES if page != DEPLOY]
    run_python(hub, RUN, [f"import os; os.chdir({str(tmp_path)!r})", *programs, ""])


def test_links_lead_to_files() -> None:
    for page in (*PAGES, CONTRIBUTING):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page.parent / link).exists(), (page, link)


@pytest.mark.parametrize("name", ["g_resnext50", "resnext50_32x4d"])
def test_the_code_of_a_model_card_prints_its_comments(name: str, hub: dict[str, str], tmp_path: Path) -> None:
    codes = blocks(ROOT / "hub_configs" / f"{name}.dgconv_in1k" / "README.md", "python")
    Image.new("RGB", (320, 240), "white").save(tmp_path / "image.png")
    printed = run_python(hub, RUN, [*codes, str(tmp_path / "image.png")])
    assert len(printed) == 3
    for code, output in zip(codes, printed, strict=True):
        assert output.splitlines() == re.findall(r"#  (torch\.Size.*)", code)


def test_our_commands_run_in_the_order_of_the_pages(original: Original, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g_resnext50.pth.tar").symlink_to(original[0])
    run_folder = Path("output/train/RUN")
    run_folder.mkdir(parents=True)
    model = timm.create_model("g_resnext50")
    for epoch, name in enumerate(("checkpoint-0", "checkpoint-1", "model_best")):
        torch.save({"epoch": epoch, "state_dict": model.state_dict()}, f"{run_folder}/{name}.pth.tar")
    timm.models.save_for_hf(model, "g_resnext50_demo", safe_serialization=True)
    done = []
    for command in named("timm-dgconv"):
        args = [str(path) for arg in shlex.split(command)[1:] for path in ([*sorted(Path().glob(arg))] or [arg])]
        if args[0] == "demo" or (args[0] == "publish" and "--dry-run" not in args):
            continue  # test_demo runs one, test_publish runs the other
        assert main(args) == 0, command
        done.append(args[0])
    assert set(done) == {"convert", "inspect", "measure", "publish"}
    assert Path("groups.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_of_the_readme_runs(tmp_path: Path) -> None:
    (command,) = (command for command in named("timm-dgconv") if "demo" in shlex.split(command))
    subprocess.run([Path(sys.executable).with_name("timm-dgconv"), *shlex.split(command)[1:]], cwd=tmp_path, check=True)


@pytest.mark.skipif(SCRIPTS is None, reason="TIMM_SCRIPTS_DIR is not set to a checkout of timm's repository")
def test_timm_scripts_take_the_flags() -> None:
    code = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import timm
for command in json.loads(sys.argv[2]):
    place = next(n for n, word in enumerate(command) if word.endswith(".py"))
    args = importlib.import_module(command[place].removesuffix(".py")).parser.parse_args(command[place + 1 :])
    timm.create_model(args.model, device="meta", **vars(args).get("model_kwargs", {}))
"""
    commands = [shlex.split(command) for command in named("python") + named("torchrun")]
    scripts = [words for words in commands if not words[1].startswith("benchmarks/")]
    assert SCRIPTS is not None
    subprocess.run([sys.executable, "-c", code, SCRIPTS, json.dumps(scripts)], check=True)


def test_benchmarks_have_the_options(monkeypatch: Patch, capsys: Capture) -> None:
    found = [command for command in named("python", *PAGES, CONTRIBUTING) if "benchmarks/" in command]
    assert found
    for script, *args in (shlex.split(command)[1:] for command in found):
        monkeypatch.setattr(sys, "argv", [script, *args, "--help"])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stop.value.code == 0
        assert {word for word in args if word.startswith("--")} <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
