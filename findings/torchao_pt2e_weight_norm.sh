#!/usr/bin/env bash
# torchao cannot quantize a convolution with weight_norm: an error with a batch norm behind it, and float without one.
#
# Software: torchao 0.18.0, torch 2.14.1 (CPU).
# Input: Conv2d, with or without torch.nn.utils.parametrizations.weight_norm, with or without BatchNorm2d, and ReLU.
#   torch.export, prepare_pt2e and convert_pt2e with the X86InductorQuantizer.
# Expected: in all four networks the convolution has quantized weights, or prepare_pt2e leaves it alone.
# Seen: without weight_norm both are quantized. With weight_norm and a batch norm, prepare_pt2e raises "Expected get_attr node,
#   got call_function", since it folds the norm into a weight that it takes for a parameter. Without a norm it leaves the
#   convolution in float and says nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchao==0.18.0 torch==2.14.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

warnings.filterwarnings("ignore")
print("torchao", version("torchao"), "torch", torch.__version__)
images = torch.randn(1, 3, 8, 8)
seen = []
for is_normed in (False, True):
    for norms in ([], [nn.BatchNorm2d(8)]):
        conv = nn.Conv2d(3, 8, 3)
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(conv) if is_normed else conv, *norms, nn.ReLU()).eval()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        graph = torch.export.export(net, (images,)).module()
        try:
            prepared = prepare_pt2e(graph, quantizer)
        except ValueError as error:
            seen.append(str(error))
        else:
            prepared(images)
            nodes = convert_pt2e(prepared).graph.nodes
            weights = [str(node.args[1].target) for node in nodes if "conv2d" in str(node.target)]
            seen.append("quantized" if all("dequantize" in name for name in weights) else "float")
        print(f"weight_norm: {is_normed}, batch norm: {bool(norms)}: {seen[-1]}")
raise SystemExit(seen != ["quantized", "quantized", "float", "Expected get_attr node, got call_function"])
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
