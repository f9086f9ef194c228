"""The command line: exit status, and one line for an error."""

import os
import subprocess
import sys
from pathlib import Path


def test_installed_command_exits_with_the_status(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("timm-dgconv")
    command = [program, "inspect", tmp_path / "missing.pth", "--model", "g_resnext50"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}  # an old timm in a new torch warns
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 2
    assert result.stderr.startswith("timm-dgconv inspect: ")
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)
