#!/usr/bin/env bash
# thop and ultralytics-thop install the same package, and count differently. pip installs one over the other.
#
# Software: thop 0.1.1.post2209072238, ultralytics-thop 2.2.3, torch 2.14.1 (CPU).
# Input: the multiply-adds of a transposed 3x3 convolution with 8 channels and of a 2x2 average pooling, 4x4 pixels each,
#   with thop, and again after an installation of ultralytics-thop. Then ultralytics-thop is uninstalled.
# Expected: pip names a conflict, or each distribution has files of its own.
# Seen: `pip check` finds nothing broken and `pip list` has both, but `import thop` is that of ultralytics. The counts
#   change from 20,736 and 32 to 9,216 and 160 (9,216 is right for the convolution). Uninstalling ultralytics-thop also
#   removes the files of thop: `pip list` has it, and the package is empty.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() {
  "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@" 2> "$folder/pip.log" || cat "$folder/pip.log"
}
install thop==0.1.1.post2209072238 torch==2.14.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys
from importlib.metadata import distributions

import thop

found = []
if hasattr(thop, "profile"):
    import torch
    from torch import nn

    for module in (nn.ConvTranspose2d(8, 8, 3), nn.AvgPool2d(2)):
        found.append(int(thop.profile(module, (torch.randn(1, 8, 4, 4),), verbose=False)[0]))
installed = sorted(d.metadata["Name"] for d in distributions() if "thop" in d.metadata["Name"])
print(f"installed: {installed}; counts: {found or 'thop is empty'}")
raise SystemExit(found != [int(count) for count in sys.argv[1:]])
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 20736 32
install ultralytics-thop==2.2.3
"$folder/venv/bin/pip" check --disable-pip-version-check
"$folder/venv/bin/python" "$folder/show.py" 9216 160
"$folder/venv/bin/pip" uninstall -qy ultralytics-thop
"$folder/venv/bin/python" "$folder/show.py"
"$folder/venv/bin/pip" list --disable-pip-version-check | grep '^thop '
