#!/usr/bin/env bash
# ExecuTorch's XNNPACK delegate refuses convolutions whose weights are channels_last.
#
# Software: executorch 1.5.1, torch 2.14.1.
# Input: one nn.Conv2d(3, 8, 3) with .to(memory_format=torch.channels_last), and an image.
# Expected: XNNPACK computes in channels_last, so such a network converts at least as well as another one.
# Seen: an image that is channels_last converts. A weight that is channels_last is an error: "An error occurred when running
#   the 'ChannelsLastTaggedReshapePass' pass", and its cause is "Expected p_weight to be NCHW". The memory format changes
#   no value, torch.export takes the network, and net.to(memory_format=torch.contiguous_format) before it is enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check executorch==1.5.1 torch==2.14.1
cat > "$folder/show.py" <<'PYTHON'
from importlib.metadata import version

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def convert(weight: str, image: str) -> str:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 8, 3).eval().to(memory_format=FORMATS[weight])
    x = torch.randn(1, 3, 16, 16).to(memory_format=FORMATS[image])
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x))
    try:
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    except Exception as error:
        return f"{error} ({error.__context__ or error.__cause__})"
    buffer = program.to_executorch().buffer
    loaded = Runtime.get().load_program(buffer)  # a method does not keep it alive
    method = loaded.load_method("forward")
    torch.testing.assert_close(method.execute([x])[0], net(x))
    return "computes the same"


print(f"executorch {version('executorch')}, torch {torch.__version__}")
found = {pair: convert(*pair) for pair in (("NCHW", "NCHW"), ("NCHW", "channels_last"), ("channels_last", "NCHW"))}
for (weight, image), outcome in found.items():
    print(f"weight {weight}, image {image}: {outcome}")
first, second, third = found.values()
raise SystemExit(not (first == second == "computes the same" and "ChannelsLastTaggedReshapePass" in third))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
