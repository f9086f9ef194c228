#!/usr/bin/env bash
# The weight gradient of a group convolution is wrong for a batch of one image that has its channels last.
#
# Software: torch 2.14.1 (CPU).
# Input: an image in the order height, width, channels, permuted and unsqueezed to a batch of one, and a torch.nn.Conv2d with
#   groups and a weight in channels_last. The stride of the batch dimension is unusual, and is never used for one image.
# Guess: the stride does not matter, as in all other cases.
# Expected: the gradient that the same image has after a copy.
# Seen: the output and the gradient of a convolution with one group are right. With groups the weight gradient is wrong, as far
#   from the right one as another random gradient: in float64 for 1x1 and 3x3 kernels, in float32 with one thread for 1x1
#   kernels. No error, no warning. A copy of the image, or a contiguous weight, gives the right one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)  # with more threads, oneDNN computes float32, and is right
print("torch", torch.__version__)


def error(groups: int, kernel_size: int, dtype: torch.dtype) -> float:
    """Return the relative error of the weight gradient."""
    image = torch.randn(11, 12, 32, dtype=dtype).permute(2, 0, 1).unsqueeze(0)
    conv = nn.Conv2d(32, 32, kernel_size, groups=groups, dtype=dtype).to(memory_format=torch.channels_last)
    found, expected = (torch.autograd.grad(conv(x).square().sum(), conv.weight)[0] for x in (image, image.contiguous()))
    assert torch.allclose(conv(image), conv(image.contiguous()))
    result = ((found - expected).norm() / expected.norm()).item()
    print(f"{groups} groups, {kernel_size}x{kernel_size}, {dtype}: error {result:.2g}, strides {image.stride()}")
    return result


wrong = [error(8, 1, torch.float64), error(8, 3, torch.float64), error(2, 1, torch.float32)]
right = [error(1, 1, torch.float64), error(1, 3, torch.float64), error(8, 3, torch.float32)]
raise SystemExit(not (min(wrong) > 0.5 and max(right) < 1e-4))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
