#!/usr/bin/env bash
# After an error of calflops, all its later counts in the process are too high.
#
# Software: calflops 0.3.2, torch 2.14.1 (CPU), transformers 5.24.0, which calflops imports and does not require.
# Input: calculate_flops of a 1x1 convolution, then of nn.AvgPool2d(2) and of the same convolution in turn, three times.
# Expected: the convolution has 1,024 multiply-adds each time, and the pool has none.
# Seen: the pool raises StopIteration, since it has no parameters. At this point calflops has replaced the functions of
#   torch.nn.functional, and it does not put them back. The next call wraps the wrappers. So the count of the convolution
#   is 1,024, then 2,048, 3,072 and 4,096, without a warning, and no later call without an error repairs it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check calflops==0.3.2 torch==2.14.1 numpy transformers==5.24.0
cat > "$folder/show.py" <<'PYTHON'
from importlib.metadata import version

import torch
from calflops import calculate_flops
from torch import nn

original = nn.functional.conv2d


def count(model: nn.Module) -> int | str:
    try:
        return calculate_flops(model, (1, 8, 4, 4), print_results=False, output_as_string=False)[1]
    except Exception as error:
        return type(error).__name__


conv = nn.Conv2d(8, 8, 1, bias=False)
real = 8 * 8 * 4 * 4
found = [count(conv)]
for _ in range(3):
    found += [count(nn.AvgPool2d(2)), count(conv)]
print(f"calflops {version('calflops')}, torch {torch.__version__}: {real:,} multiply-adds by hand")
print(f"convolution, then a pool and the convolution in turn: {found}")
print(f"torch.nn.functional.conv2d is that of torch: {nn.functional.conv2d is original}")
raise SystemExit(found[::2] != [real, 2 * real, 3 * real, 4 * real] or nn.functional.conv2d is original)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
