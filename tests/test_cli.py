"""The command line: help, exit status, and one line for an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Capture

from timm_dgconv.cli import main


@pytest.mark.parametrize("command", ["", "demo", "convert", "publish", "inspect", "measure"])
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*filter(None, [command]), "--help"])
    assert stop.value.code == 0
    assert f"usage: timm-dgconv {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [[], ["convert", "source"], ["inspect", "source", "--model", "g_resnext50", "--model-kwargs", "stem_type"]]
)
def test_wrong_usage_exits_with_status_2(args: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "usage: timm-dgconv" in capsys.readouterr().err


def test_installed_command_exits_with_the_status(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("timm-dgconv")
    command = [program, "inspect", tmp_path / "missing.pth", "--model", "g_resnext50"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}  # an old timm in a new torch warns
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 2
    assert result.stderr.startswith("timm-dgconv inspect: ")
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)
