#!/usr/bin/env bash
# PEFT's OFT changes what a 3x3 convolution computes before any training, and merging changes it back.
#
# Software: peft 0.21.2, torch 2.14.1 (CPU).
# Input: nn.Conv2d with kernels 1x1, 2x2 and 3x3, adapted by OFTConfig with its default initial values, which are an identity.
# Expected: the adapted convolution computes the same as before, and the same as the merged one.
# Seen: both hold for 1x1. The outputs of 2x2 and 3x3 kernels differ by more than the largest output, while the merged
#   convolution is the original one. The adapter rotates the patches of the image, and adds them up into an image with
#   torch.nn.functional.fold. A pixel that belongs to nine patches is then counted nine times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 torch==2.14.1 numpy
cat > "$folder/show.py" <<'PYTHON'
from importlib.metadata import version

import torch
from peft import OFTConfig, get_peft_model

torch.manual_seed(0)
images = torch.randn(2, 8, 6, 6)
print("peft", version("peft"), "torch", torch.__version__)
changes = {}
for kernel in (1, 2, 3):
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, kernel)).eval()
    expected = net(images).detach()
    config = OFTConfig(r=0, oft_block_size=8 * kernel * kernel, target_modules=["0"])
    adapted = get_peft_model(net, config).eval()
    outputs = adapted(images).detach(), adapted.merge_and_unload()(images).detach()
    changes[kernel] = [((y - expected).abs().max() / expected.abs().max()).item() for y in outputs]
    print("kernel {0}x{0}: the adapted output differs by {1:.3f}, the merged one by {2:.3f}".format(kernel, *changes[kernel]))
wrong = all(changes[kernel][0] > 1 > 1e-5 > changes[kernel][1] for kernel in (2, 3))
raise SystemExit(not (wrong and max(changes[1]) < 1e-5))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
