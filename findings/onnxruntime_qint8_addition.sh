#!/usr/bin/env bash
# ONNX Runtime computes the int8 convolutions around a shortcut in float if activations have the default type.
#
# Software: onnxruntime 1.32.0, onnx 1.23.2, on x86-64.
# Input: three convolutions with ReLUs, without and with a shortcut around the last two (an addition, as in a residual network).
#   quantize_static quantizes them with activation_type=QInt8, its default, and with QUInt8.
# Expected: ONNX Runtime computes all three convolutions as QLinearConv, since the files have the same operators, and since
#   it does so without the shortcut with both types.
# Seen: with the shortcut and QInt8 it computes one as QLinearConv, and two convolutions and the addition in float. With
#   QUInt8 all three are QLinearConv, and the addition is QLinearAdd. No message says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
folder = Path(sys.argv[1])
random = np.random.default_rng(0)
shape = [1, 16, 16, 16]
images = [random.standard_normal(shape).astype(np.float32) for _ in range(8)]
weights = [
    numpy_helper.from_array((random.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32), f"w{n}") for n in range(3)
]
nodes = [
    helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("Conv", ["b", "w1"], ["c"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["c"], ["d"]),
    helper.make_node("Conv", ["d", "w2"], ["e"], pads=[1, 1, 1, 1]),
    helper.make_node("Add", ["e", "b"], ["f"]),
    helper.make_node("Relu", ["f"], ["y"]),
]
chain = [*nodes[:4], helper.make_node("Conv", ["d", "w2"], ["y"], pads=[1, 1, 1, 1])]
ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in "xy"]

class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.rest = iter(images)

    def get_next(self):
        return next(({"x": image} for image in self.rest), None)


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


counts, written = [], []
for name, net in {"without": chain, "with": nodes}.items():
    graph = helper.make_graph(net, "block", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "float.onnx")
    for kind in (QuantType.QInt8, QuantType.QUInt8):
        quantize_static(folder / "float.onnx", folder / "int8.onnx", Reader(), activation_type=kind, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(folder / "run.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
        run = operators(folder / "run.onnx")
        written.append(operators(folder / "int8.onnx"))
        counts.append((run["QLinearConv"], run["Conv"]))
        print(f"{name} shortcut, {kind}: written {dict(written[-1])}, run {dict(run)}")
assert written[0] == written[1]
assert written[2] == written[3]
raise SystemExit(counts != [(3, 0), (3, 0), (1, 2), (3, 0)])
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
