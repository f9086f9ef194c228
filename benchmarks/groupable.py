"""Convert networks with `timm_dgconv.groupable`, close gates, and compare all forms.

    python benchmarks/groupable.py --output benchmarks/results

The result is groupable.md, a table with one row per network. The networks have random weights, and random values in
their norms. Half of the gates are closed at random. Differences are relative to the largest output, in float64. The
columns are:

- the converted convolutions, and the convolutions that stay as they are, with the reasons
- the difference of the outputs after `groupable`, and after gates are closed
- what `compact` changes then: the outputs, `forward_features`, `forward_intermediates`, and the outputs in training
  mode. A network that is not of timm may have no such method.
- the largest of these differences after `timm.utils.reparameterize_model`, with and without `compact`. A YOLO has a
  method `fuse` instead.
- modules of the compact form that have another type than in the source network
- nodes in the exported compact form that select channels by an index
"""

import argparse
import copy
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import timm
import torch
import torchvision
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_dgconv import DGConv2d, compact, groupable, skipped_convs

NETWORKS = (
    *("resnet18", "resnet34", "resnet50", "resnet50d", "wide_resnet50_2", "seresnet50", "ecaresnet50t", "resnetv2_50"),
    *("resnetblur50", "res2net50_26w_4s", "resnest50d", "skresnet18", "regnetx_032", "regnety_032", "vgg11_bn"),
    *("vgg16_bn", "darknet53", "cspresnet50", "cspdarknet53", "hrnet_w18_small", "densenet121", "dla34", "dpn48b"),
    *("repvgg_a0", "selecsls42b", "tresnet_m", "xception41", "inception_v3", "mobilenetv2_100", "efficientnet_b0"),
    *("hardcorenas_a", "ghostnet_100", "convnext_atto", "nf_resnet50", "test_byobnet"),
    *("torchvision resnet50", "torchvision googlenet", "smp Unet resnet18", "ultralytics yolov8n"),
)
METHODS = {"compact: outputs": "forward", "features": "forward_features", "intermediates": "forward_intermediates"}
Outputs = dict[str, list[Tensor]]


def create(name: str) -> nn.Module:
    """Create a network with random norms, in evaluation mode and float64."""
    torch.manual_seed(0)
    library, _, rest = name.partition(" ")
    if library == "torchvision":
        options = dict(aux_logits=True, init_weights=False) if rest == "googlenet" else {}
        model: Any = torchvision.models.get_model(rest, weights=None, **options)
    elif library == "smp":
        import segmentation_models_pytorch as smp

        model = smp.Unet(rest.split()[1], encoder_weights=None)
    elif library == "ultralytics":
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel(f"{rest}.yaml", verbose=False)
    else:
        model = timm.create_model(name)
    for value in model.state_dict().values():
        if value.ndim == 1 and value.is_floating_point():
            value.uniform_(0.5, 1.5) if value.min() >= 0 else value.uniform_(-0.5, 0.5)
    return model.double().eval()


def is_3x3(name: str, conv: nn.Conv2d) -> bool:
    """Choose the 3x3 convolutions of a YOLO but the first, which reads three channels.

    By default `groupable` converts nothing in it, since the network itself has a method `fuse`.
    """
    return conv.kernel_size == (3, 3) and conv.in_channels > 3


@torch.no_grad()
def run(model: Any, images: Tensor, training: bool = False) -> Outputs:
    """Return what the methods of a network return, or its outputs in training mode. The network is not changed."""
    if training:
        torch.manual_seed(0)  # dropout
        return {"in training mode": list(_tensors(copy.deepcopy(model).train()(images)))}
    return {
        name: list(_tensors(getattr(model, method)(images)))
        for name, method in METHODS.items()
        if hasattr(model, method)
    }


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield all tensors in the output of a network."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


def differences(found: Outputs, expected: Outputs) -> dict[str, float]:
    """Return the largest difference of each kind of output, relative to the largest value of its tensor."""
    assert found.keys() == expected.keys()
    result = {}
    for name, tensors in expected.items():
        pairs = list(zip(found[name], tensors, strict=True))
        result[name] = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
    return result


def count_index_nodes(model: nn.Module, images: Tensor) -> int:
    """Return how many nodes of the exported network select channels by an index."""
    targets = [str(node.target) for node in torch.export.export(model, (images,)).graph.nodes]
    return sum(name in target for target in targets for name in ("index_select", "aten.index.Tensor", "gather"))


def row(name: str) -> bench.Row:
    """Return the row of a network."""
    model: Any = create(name)
    where = is_3x3 if name.startswith("ultralytics") else None
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    before = run(model, images)
    types = {key: type(module) for key, module in model.named_modules()}
    reasons = Counter(_short(reason) for reason in skipped_convs(model, where).values())
    skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    try:
        groupable(model, where)
    except ValueError:
        return {"network": name, "converted": 0, "skipped convolutions": skipped, "after groupable": "refused"}
    convs = [module for module in model.modules() if isinstance(module, DGConv2d)]
    same = differences(run(model, images), before)["compact: outputs"]
    for conv in convs:
        with torch.no_grad():
            conv.gate[torch.rand_like(conv.gate) < 0.5] *= -1
    after = run(model, images)
    changed = differences(after, before)["compact: outputs"]
    small: Any = compact(model)
    found = differences(run(small, images), after)
    found |= differences(run(small, images, training=True), run(model, images, training=True))
    if where is None:
        deployed = [reparameterize_model(small), reparameterize_model(model)]
    else:
        deployed = [copy.deepcopy(small).fuse()]
    fused = max(value for net in deployed for value in differences(run(net, images), after).values())
    result: bench.Row = {"network": name, "converted": len(convs), "skipped convolutions": skipped}
    result |= {"after groupable": f"{same:.0e}", "after closing gates": f"{changed:.2f}"}
    result |= {key: f"{found[key]:.0e}" if key in found else "" for key in (*METHODS, "in training mode")}
    result["reparameterized"] = f"{fused:.0e}"
    result["modules of another type"] = sum(types[key] is not type(module) for key, module in small.named_modules())
    return result | {"index nodes": count_index_nodes(small, images)}


def _short(reason: str) -> str:
    """Return a reason that is the same for different channel counts."""
    shorter = {
        "only one gate": "only one gate",
        "depthwise": "depthwise",
        "1x1": "1x1",
        "must both be even": "odd channels",
        "power of two up to": "groups are not a power of two",
        "merges": "merges",
        "does not choose": "not chosen",
        "forward pass": "subclass of Conv2d",
    }
    return next((short for part, short in shorter.items() if part in reason), reason)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of groupable.md; created if it is missing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    rows: list[bench.Row] = []
    for name in args.networks:
        try:
            rows.append(row(name))
        except ImportError as error:
            rows.append({"network": name, "converted": f"not run: {error}"})
        print(json.dumps(rows[-1]), flush=True)
    print(bench.table(rows))
    if args.output:
        used = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
        text = ["# Networks whose convolutions learn their groups", "", *(__doc__ or "").splitlines()]
        text += ["", used, "", bench.table(rows)]
        (args.output / "groupable.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
