#!/usr/bin/env bash
# timm cannot load a folder that transformers has saved: "model_args": null in config.json.
#
# Software: timm 1.0.31, transformers 5.24.0 (torch 2.14.1).
# Input: a model of timm that transformers loads and saves again, TimmWrapperForImageClassification.save_pretrained.
# Expected: timm.create_model("local-dir:FOLDER", pretrained=True) loads it. transformers writes architecture and
#   pretrained_cfg as timm does, and saves the weights with timm's names.
# Seen: AttributeError: 'NoneType' object has no attribute 'get'. The configuration of transformers has a field
#   model_args, which it writes as null if the source has none. timm reads cfg.get("model_args", {}), which is then
#   None, and asks it for dynamic_img_size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 timm==1.0.31 transformers==5.24.0
cat > "$folder/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import timm
import torch
import transformers

source, saved = Path(sys.argv[1], "source"), Path(sys.argv[1], "saved")
model = timm.create_model("test_resnet", num_classes=5)
timm.models.save_for_hf(model, source, safe_serialization=True)
config = json.loads((source / "config.json").read_text())
del config["model_args"]  # earlier versions of timm do not write it, nor do most models on the Hub have it
(source / "config.json").write_text(json.dumps(config))

wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(source)
wrapper.save_pretrained(saved)
config = json.loads((saved / "config.json").read_text())
print(f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print(f"transformers has saved {config['architecture']} with model_args {json.dumps(config['model_args'])}")
seen = ""
try:
    timm.create_model(f"local-dir:{saved}", pretrained=True)
except AttributeError as error:
    seen = str(error)
print(f"timm loads the folder: {seen or 'yes'}")
del config["model_args"]
(saved / "config.json").write_text(json.dumps(config))
again = timm.create_model(f"local-dir:{saved}", pretrained=True)
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
print(f"without model_args it loads the same weights: {same}")
raise SystemExit(not (seen == "'NoneType' object has no attribute 'get'" and same))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
