#!/usr/bin/env bash
# torch.utils.flop_counter counts nothing for nn.TransformerEncoderLayer in inference, and nothing for nn.LSTM on a CPU.
#
# Software: torch 2.14.1 (CPU).
# Input: nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=64, batch_first=True) in evaluation mode, with and without
#   torch.no_grad(), and nn.LSTM(16, 32), each with one sequence of 10 tokens.
# Expected: torch.no_grad() changes no count. By hand the projections of the encoder layer are 30,720 multiply-adds, and
#   the matrix products of the LSTM 61,440.
# Seen: without gradients the encoder layer is one operator (_transformer_encoder_layer_fwd), and an LSTM on a CPU is one
#   operator (mkldnn_rnn_layer). The counter has no formula for either, and says 0 without a warning. With gradients it
#   leaves out the two products of attention on a CPU (3,200 multiply-adds).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import warnings

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

TOKENS, WIDTH, HIDDEN, CELLS = 10, 16, 64, 32
warned = []
warnings.showwarning = lambda message, *args, **kwargs: warned.append(str(message))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def count(model: nn.Module, grad: bool, operator: str) -> int:
    x = torch.randn(1, TOKENS, WIDTH)
    with torch.set_grad_enabled(grad):
        with FlopCounterMode(display=False) as counter:
            model(x)
        with Operators() as seen:
            model(x)
    macs = counter.get_total_flops() // 2
    is_fused = operator in seen.names
    print(f"{type(model).__name__}, {'with' if grad else 'without'} gradients: {macs:,} multiply-adds; {operator}: {is_fused}")
    return macs if macs or is_fused else -1


encoder = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True).eval()
lstm = nn.LSTM(WIDTH, CELLS, batch_first=True).eval()
projections = TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
recurrent = TOKENS * 4 * CELLS * (WIDTH + CELLS)
print(f"torch {torch.__version__}; by hand {projections:,} for the encoder layer and {recurrent:,} for the LSTM")
found = [count(encoder, grad, "_transformer_encoder_layer_fwd") for grad in (True, False)]
found += [count(lstm, grad, "mkldnn_rnn_layer") for grad in (True, False)]
print(f"warnings: {warned}")
raise SystemExit(found != [projections, 0, 0, 0] or bool(warned))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
