"""Convert networks with `timm_dgconv.groupable`, close gates, and compare all forms.

    python benchmarks/groupable.py --output benchmarks/results

The result is groupable.md, a table with one row per network. The networks have random weights, and random values in
their norms. The columns are: the converted convolutions; the convolutions that stay as they are, with the reasons; the
difference of the outputs after `groupable`; the difference after half of the gates are closed at random; the
differences that `compact` and `reparameterize_model` make to that; the orders of channels that the group convolutions
need, and the orders that move into the weights around them. Differences are relative to the largest output, in float64.
"""

import argparse
import copy
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import reparameterize_model
from timm_dgconv.models.groupable import skipped_convs
from torch import nn

from timm_dgconv import DGConv2d, compact, groupable
from timm_dgconv.models.compact import group_layers

NETWORKS = (
    *("resnet18", "resnet34", "resnet50", "resnet50d", "wide_resnet50_2", "seresnet50", "ecaresnet50t", "resnetv2_50"),
    *("resnetblur50", "res2net50_26w_4s", "resnest50d", "skresnet18", "regnetx_032", "regnety_032", "vgg11_bn"),
    *("vgg16_bn", "darknet53", "cspresnet50", "cspdarknet53", "hrnet_w18_small", "densenet121", "dla34", "dpn48b"),
    *("repvgg_a0", "selecsls42b", "tresnet_m", "xception41", "inception_v3", "mobilenetv2_100", "efficientnet_b0"),
    *("hardcorenas_a", "ghostnet_100", "convnext_atto", "nf_resnet50", "test_byobnet"),
    *("torchvision resnet50", "torchvision googlenet", "smp Unet resnet18"),
)


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
    else:
        model = timm.create_model(name)
    for key, value in model.state_dict().items():
        if value.ndim == 1 and value.is_floating_point() and "gate" not in key:
            value.uniform_(0.5, 1.5) if value.min() >= 0 else value.uniform_(-0.5, 0.5)
    return model.double().eval()


def difference(model: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of the outputs, relative to the largest output."""
    with torch.inference_mode():
        return ((model(images) - expected).abs().max() / expected.abs().max()).item()


def row(name: str, closed: float) -> str:
    """Return the row of a network."""
    model = create(name)
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.inference_mode():
        before = model(images)
    reasons = Counter(_short(reason) for reason in skipped_convs(model).values())
    skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    try:
        groupable(model)
    except ValueError:
        return f"| {name} | 0 | {skipped} | refused | | | | | |"
    convs = [module for module in model.modules() if isinstance(module, DGConv2d)]
    same = difference(model, images, before)
    for conv in convs:
        with torch.no_grad():
            conv.gate[torch.rand_like(conv.gate) < closed] *= -1
    with torch.inference_mode():
        after = model(images)
    changed = difference(model, images, before)
    small = compact(model)
    alone = [conv.to_group_conv().num_orders() for conv in copy.deepcopy(convs)]
    orders = [conv.num_orders() for conv in group_layers(small).values()]
    deployed = reparameterize_model(model)
    errors = [f"{difference(net, images, after):.0e}" for net in (small, deployed)]
    return (
        f"| {name} | {len(convs)} | {skipped} | {same:.0e} | {changed:.2f} | {' | '.join(errors)} | {sum(alone)} "
        f"| {sum(alone) - sum(orders)} |"
    )


def _short(reason: str) -> str:
    """Return a reason that is the same for different channel counts."""
    for part in ("only one gate", "depthwise", "1x1", "must both be even", "power of two up to", "merges"):
        if part in reason:
            return {"power of two up to": "groups are not a power of two", "must both be even": "odd channels"}.get(
                part, part
            )
    return "subclass of Conv2d" if "forward pass" in reason else reason


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--closed", type=float, default=0.5, help="share of the gates to close")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = [
        "| network | converted | skipped convolutions | difference after groupable | after closing gates | compact "
        "| reparameterized | orders of channels | absorbed |",
        f"|{'---|' * 9}",
    ]
    print("\n".join(lines), flush=True)
    for name in args.networks:
        try:
            lines.append(row(name, args.closed))
        except ImportError as error:
            lines.append(f"| {name} | not run: {error} | | | | | | | |")
        print(lines[-1], flush=True)
    if args.output:
        used = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
        text = [
            "# Networks whose convolutions learn their groups",
            "",
            *(__doc__ or "").splitlines(),
            "",
            used,
            "",
            *lines,
        ]
        (args.output / "groupable.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
