#!/usr/bin/env bash
# pnnx.export fails for an nn.Sequential, since it writes Python with the names of its modules, which are numbers.
#
# Software: pnnx 20261020, torch 2.14.1.
# Input: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), and the same modules in a class with names.
# Expected: both convert. The names of modules are no part of what a network computes.
# Seen: the named modules convert. For the nn.Sequential pnnx writes the line `self.0 = nn.Conv2d(...)` into a Python file,
#   imports it, and raises SyntaxError. The files for ncnn exist at that time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pnnx==20261020 torch==2.14.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import os
from importlib.metadata import version

import pnnx
import torch
from torch import nn


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.conv(x))


def convert(name: str, net: nn.Module) -> str:
    x = torch.randn(1, 3, 16, 16)
    try:
        converted = pnnx.export(net.eval(), f"{name}.pt", (x,))
    except SyntaxError as error:
        return f"SyntaxError in {error.text.split('=')[0].strip()!r}"
    torch.testing.assert_close(converted(x), net(x))
    return "converts"


named = convert("named", Named())
sequential = convert("sequential", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
written = os.path.exists("sequential.ncnn.param")
print(f"pnnx {version('pnnx')}, torch {torch.__version__}")
print(f"named modules: {named}; nn.Sequential: {sequential}; the files for ncnn exist: {written}")
raise SystemExit(not (named == "converts" and sequential == "SyntaxError in 'self.0'" and written))
PYTHON
cd "$folder"
venv/bin/python show.py
