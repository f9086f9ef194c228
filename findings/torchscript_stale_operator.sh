#!/usr/bin/env bash
# torch.jit.script takes a tuple attribute of a module for an operator.
#
# Software: torch 2.9.1 (CPU).
# Input: an operator of torch.library that gets a second overload after its first use, as quantized_decomposed of torch
#   itself does, and a module with a tuple of four integers as an attribute.
# Expected: the module scripts.
# Seen: torch keeps a table from id(operator) to its name. The second overload replaces the operator, the first one is
#   freed, and its entry stays. A tuple that Python allocates at that address is then "a builtin", and the error is
#   "builtin cannot be used as a value". nn.Conv2d has such a tuple, so scripting a network fails at random, and rarely.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.9.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import gc
import warnings

import torch

warnings.filterwarnings("ignore")
library = torch.library.Library("example", "DEF")
tuples = []
for number in range(50):
    library.define(f"twice{number}(Tensor x) -> Tensor")
    getattr(torch.ops.example, f"twice{number}")  # the first use
    library.define(f"twice{number}.scaled(Tensor x, float scale) -> Tensor")
    gc.collect()
    tuples += [(n, n, n, n) for n in range(1000)]


class Shift(torch.nn.Module):
    def __init__(self, shifts: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.shifts = shifts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shifts[0]


failed = 0
table = torch.jit._builtins._get_builtin_table()
taken = [shifts for shifts in tuples if id(shifts) in table]
for shifts in taken:
    try:
        torch.jit.script(Shift(shifts))
    except RuntimeError as error:
        failed += "builtin cannot be used as a value" in str(error)
scripted = torch.jit.script(Shift((1, 1, 1, 1)))(torch.zeros(1)).item()
print(f"torch {torch.__version__}: of {len(tuples):,} tuples {len(taken)} have the address of a freed operator")
print(f"modules with one of them that fail to script: {failed} of {len(taken)}; another tuple scripts: {scripted == 1}")
raise SystemExit(not (taken and failed == len(taken) and scripted == 1))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
