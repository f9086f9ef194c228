"""Compare learned groups with fixed groups, random groups and pruning on Fashion-MNIST.

    python benchmarks/study.py --data-dir data            # everything
    python benchmarks/study.py --data-dir data --quick    # one seed from scratch at 1/8 of the connections
    python benchmarks/study.py --report                   # table and figure of the finished runs
    python benchmarks/study.py --data-dir data --forms    # the forms of gates, with two optimizers
    python benchmarks/study.py --data-dir data --costs    # networks with the same multiply-adds, and their times
    python benchmarks/study.py --data-dir data --pairs    # the same with two images side by side, as a hundred classes
    python benchmarks/study.py --report --forms           # the table of the forms, of --costs or of --pairs
    python benchmarks/study.py --data-dir data --model g_resnet18     # another network

`--data-dir` is the folder with FashionMNIST/raw, as torchvision writes it. `--download` fetches the images. The files
of Debian's package dataset-fashion-mnist work, too:

    mkdir -p data/FashionMNIST/raw && cp /usr/share/datasets/fashion-mnist/*.gz data/FashionMNIST/raw
    gunzip data/FashionMNIST/raw/*.gz

Each finished run is one row of study.json in `--output` (or of study_forms.json, study_costs.json, study_pairs.json),
and a second call skips it. A row has top-1 and the flips of gates for each epoch, and the rest as it is after the last
epoch. The most important runs come first. The pruned networks need torch-pruning.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import bench
import timm
import torch
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed, reparameterize_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from timm_dgconv import DGConv2d, compact, constrained_loss, demo, group_report, groupable, layer_groups, steer
from timm_dgconv.layers.checkpoints import PRETRAINED_GATE
from timm_dgconv.runtimes import RUNTIMES

IMAGE, PAIR = (1, 28, 28), (1, 28, 56)
DATA: dict[str, Any] = dict(input_size=IMAGE, crop_pct=1.0, mean=(0.286,), std=(0.353,))
NETS: dict[str, dict[str, Any]] = {
    "g_resnext50": dict(layers=(2, 2, 2, 2), channels=(16, 16, 32, 64)),  # 3x3 layers of 32, 32, 64 and 128 channels
    "g_resnet18": dict(channels=(32, 64, 128, 256)),
}
TARGET, SETTLED, SETTLED_EARLY = object(), object(), object()
BOUNDED, STEPS = dict(gate_bound=0.05), dict(gate_steps=SETTLED)
LEARNED: dict[str, dict[str, Any]] = {
    "held": dict(complexity_target=TARGET),
    "paper": dict(),
    "held, settled": dict(complexity_target=TARGET, **STEPS),
    "held, bounded": dict(complexity_target=TARGET, **BOUNDED),
    "held, bounded, settled": dict(complexity_target=TARGET, **BOUNDED, **STEPS),
    "held, from groups": dict(complexity_target=TARGET, init_groups=8),
}
"""Variants with gates that learn, with arguments of `timm.create_model`. "paper" minimises `constrained_loss`."""
ALL_GATES = "nested, slope to all gates"
FORMS: dict[str, dict[str, Any]] = {
    "nested": dict(),
    ALL_GATES: dict(),
    "sorted": dict(nested=False),
    "unsorted": dict(sort=False),
}
"""The forms of gates, with arguments of `timm.create_model`. Each is trained as "held, settled"."""
MACS: dict[str, Any] = LEARNED["held, settled"] | dict(complexity_unit="macs")
COSTS: dict[str, dict[str, Any]] = {
    "learned": MACS,
    "learned, settled early": MACS | dict(gate_steps=SETTLED_EARLY),
    "learned, 1x1 too": MACS | dict(pointwise=True),
}
"""Variants with a target in multiply-adds, with arguments of `timm.create_model`."""
PRUNED_FIRST = "pruned, then learned"
"""This variant is pruned to the square root of its share, and learns groups to reach its share."""
ARGS = LEARNED | {name: LEARNED["held, settled"] | form for name, form in FORMS.items()} | COSTS
"""Arguments of `timm.create_model` for all variants with gates that learn."""
COMPARED = ["fixed", "random", "held", "paper"]
PRUNED = {"pruned": None, "pruned, 3/4": 3 / 4, "pruned to the target": TARGET, "pruned to multiples of 8": TARGET}
"""Variants that are pruned, with their share of the dense network's multiply-adds. None is the share of "fixed"."""
NARROW = "narrow"
"""This variant has fewer channels in all layers, and one group."""
VARIANTS = ["dense", NARROW, *COMPARED, *PRUNED, *(name for name in ARGS if name not in COMPARED), PRUNED_FIRST]
PROGRAMS = [(name, batch_size) for name in ("eager", "onnxruntime") for batch_size in (1, 16)]
"""What measures the times of the deployed networks, and for how many images."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": dict(weight_decay=5e-4, momentum=0.9),
    "adamw": dict(weight_decay=0.05),
}
RATES = {
    "sgd": {"scratch": 0.1, "dense": 0.02, "warmup": 1e-3},
    "adamw": {"scratch": 2e-3, "dense": 1e-3, "warmup": 1e-5},
}
"""Learning rates from each start, and the one with which the warmup begins."""
SETTLE = 0.6
"""The part of the training after which settled gates stand still."""


class Run(NamedTuple):
    """One training: from scratch, or from the dense network of the same optimizer and seed."""

    model: str
    start: str
    variant: str
    target: float
    seed: int
    optimizer: str = "sgd"


def runs(model: str, seeds: Sequence[int], quick: bool) -> list[Run]:
    """Return all runs of a model, the most important ones first."""
    names = [("scratch", "dense", 1.0), *(("scratch", name, 1 / 8) for name in COMPARED)]
    if quick:
        return [Run(model, *name, seeds[0]) for name in names]
    if model == "g_resnet18":
        names = [("scratch", "dense", 1.0), ("dense", "dense", 1.0)]
        names += [("dense", name, 1 / 4) for name in ("fixed", "held", "held, settled", *PRUNED)]
        return [Run(model, *name, seed) for name in names for seed in seeds]
    names += [("dense", "dense", 1.0), *(("dense", name, 1 / 8) for name in [*COMPARED, *PRUNED])]
    names += [("scratch", name, 1 / 32) for name in ("fixed", "held", "paper")]
    names += [("dense", name, 1 / 32) for name in ("fixed", "held", "pruned")]
    names += [("scratch", name, 1 / 8) for name in LEARNED if name not in COMPARED]
    names += [("dense", "held, settled", target) for target in (1 / 8, 1 / 32)]
    return [Run(model, *name, seed) for name in names for seed in seeds]


def form_runs(model: str, seeds: Sequence[int], targets: Sequence[float], optimizers: Sequence[str]) -> list[Run]:
    """Return the runs that compare the forms of gates, the most important ones first."""
    result = [Run(model, "scratch", "dense", 1.0, seed, optimizer) for optimizer in optimizers for seed in seeds]
    for start, optimizer, target in itertools.product(("dense", "scratch"), optimizers, targets):
        result += [Run(model, start, name, target, seed, optimizer) for seed in seeds for name in FORMS]
    return result


def cost_runs(model: str, seeds: Sequence[int]) -> list[Run]:
    """Return the runs at equal multiply-adds, which are a share of the dense network's."""
    result = [Run(model, "scratch", "dense", 1.0, seed) for seed in seeds]
    for seed, share in itertools.product(seeds, (1 / 2, 3 / 4)):
        names = ["learned", "learned, settled early", "pruned to the target", "pruned to multiples of 8", PRUNED_FIRST]
        if model == "g_resnext50":  # its 1x1 convolutions have half of the multiply-adds
            names += ["learned, 1x1 too", "fixed"]
        result += [Run(model, "dense", name, share, seed) for name in names]
    return result


def pair_runs(model: str, seeds: Sequence[int]) -> list[Run]:
    """Return the runs with pairs of images, at half of the multiply-adds."""
    result = [Run(model, "scratch", "dense", 1.0, seed) for seed in seeds]
    for seed in seeds:
        result += [Run(model, "scratch", name, 1 / 2, seed) for name in (NARROW, "fixed")]
        names = ("learned, settled early", "learned, 1x1 too", "pruned to the target", PRUNED_FIRST, "fixed")
        result += [Run(model, "dense", name, 1 / 2, seed) for name in names]
    return result


class Pairs(Dataset[tuple[Any, int]]):
    """Pairs of images side by side. The class says what is on the left and what is on the right.

    Args:
        images: The images, and their classes. Each one is on the left once, and on the right once.
        transform: Applied to a pair.
    """

    def __init__(self, images: Any, transform: Any = None) -> None:
        self.images, self.transform = images, transform
        self.right = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a pair and its class."""
        (left, a), (right, b) = self.images[index], self.images[self.right[index]]
        pair = Image.new(left.mode, (left.width + right.width, left.height))
        pair.paste(left, (0, 0))
        pair.paste(right, (left.width, 0))
        return self.transform(pair), 10 * a + b


def build(run: Run, dense: dict[str, Tensor], steps: int) -> nn.Module:
    """Return the network at the beginning of a run.

    Args:
        run: What to train.
        dense: State dict of the trained dense network in its compact form, which has no gates and so loads into every
            form, or an empty dictionary.
        steps: Number of optimizer steps of the run.
    """
    random_seed(run.seed)
    values = {TARGET: run.target, SETTLED: round(SETTLE * steps), SETTLED_EARLY: round(SETTLE * steps / 3)}
    kwargs = {key: values.get(value, value) for key, value in ARGS.get(run.variant, {}).items()}
    kwargs |= NETS[run.model]
    if run.variant == NARROW:
        return narrow(run)
    model = create(run.model, **kwargs)
    if dense:
        model.load_state_dict(dense)
    if dense or run.variant not in ARGS:
        bench.set_groups(model, 1)
    if run.variant in PRUNED:
        return prune(model, run)
    if run.variant == PRUNED_FIRST:
        cost, pruned = multiply_adds(model), prune(model, run)
        target = run.target * cost / multiply_adds(pruned)
        steer(groupable(pruned), target=target, steps=values[SETTLED], unit="macs", input_size=DATA["input_size"])
        return pruned
    if run.variant == "fixed" and run.target in (1 / 2, 3 / 4):  # shares of the multiply-adds of g_resnext50
        bench.set_groups(model, {1 / 2: 32, 3 / 4: 2}[run.target])
        return compact(model)
    if run.variant not in ARGS:
        close_gates(model, run.target, shuffle=run.variant == "random")
        return compact(model)
    return model


def create(name: str, **kwargs: Any) -> nn.Module:
    """Return a network for the images."""
    num_classes = 10 if DATA["input_size"] == IMAGE else 100
    return timm.create_model(name, in_chans=1, num_classes=num_classes, pretrained_cfg_overlay=DATA, **kwargs)


def narrow(run: Run) -> nn.Module:
    """Return the widest network with one group and at most the share of the multiply-adds."""
    kwargs = NETS[run.model]
    channels, nets = kwargs["channels"], []
    for width in range(channels[0] // 2, channels[0] + 1):
        widths = dict(channels=tuple(width * c // channels[0] for c in channels), cardinality=1, base_width=128)
        net = create(run.model, **kwargs | widths)  # 3x3 layers of twice the channels, as those of g_resnext50
        bench.set_groups(net, 1)
        nets.append(compact(net))
    goal = run.target * multiply_adds(nets[-1])
    return [net for net in nets if multiply_adds(net) <= goal][-1]


def dgconvs(model: nn.Module) -> list[DGConv2d]:
    """Return the DGConv2d layers."""
    return [module for module in model.modules() if isinstance(module, DGConv2d)]


@torch.no_grad()
def spread_slopes(model: nn.Module) -> None:
    """Give all gates of a layer what nested gates give to one closed and one open gate: the gradient and the term."""
    for conv in dgconvs(model):
        closed, grad = conv.gate.signbit(), conv.gate.grad
        assert grad is not None
        grad.copy_(torch.where(closed, grad[closed].sum(), grad[~closed].sum()))


@torch.no_grad()
def close_gates(model: nn.Module, density: float, shuffle: bool) -> None:
    """Close gates to reach a density: the first ones of each layer, or random ones as long as they are needed."""
    if not shuffle:
        bench.set_groups(model, round(1 / density))
        return
    gates = [(conv, k) for conv in dgconvs(model) for k in range(len(conv.gate))]
    excess = (group_report(model).density - density) * sum(c.in_channels * c.out_channels for c in dgconvs(model))
    for n in torch.randperm(len(gates)).tolist():
        conv, k = gates[n]
        saved = conv.complexity().item() / 2
        if saved <= excess:
            conv.gate[k] = -PRETRAINED_GATE
            excess -= saved


def prune(model: nn.Module, run: Run) -> nn.Module:
    """Prune the channels of smallest magnitude, to a share of the multiply-adds."""
    import torch_pruning

    example = torch.zeros(1, *DATA["input_size"])
    share, plain = PRUNED.get(run.variant, math.sqrt(run.target)), compact(model)
    goal = multiply_adds(plain) * (run.target if share is TARGET else share or 1)
    if share is None:
        goal = multiply_adds(build(run._replace(variant="fixed"), {}, 1))

    def pruned(ratio: float) -> tuple[float, nn.Module]:
        result = copy.deepcopy(plain)
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.BasePruner(
            result,
            example,
            importance,
            pruning_ratio=ratio,
            global_pruning=False,
            round_to={PRUNED_FIRST: 4, "pruned to multiples of 8": 8}.get(run.variant),
            ignored_layers=[result.fc],
        ).step()
        return multiply_adds(result), result

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if pruned(middle)[0] <= goal else (middle, high)
    return pruned(high)[1]


def train(run: Run, args: argparse.Namespace) -> bench.Row:
    """Train with timm's parts, and return the row of the run."""
    torch.set_num_threads(1)
    DATA["input_size"] = PAIR if args.pairs else IMAGE  # this is another process
    start = time.monotonic()
    device = torch.device(args.device)
    saved = args.output / f"dense-{run.model}-{run.optimizer}-{run.seed}{'-pairs' * args.pairs}.pt"
    dense = torch.load(saved) if run.start == "dense" else {}
    epochs = args.epochs if run.start == "scratch" else args.epochs // 2
    steps_per_epoch = args.images // args.batch_size
    model = build(run, dense, epochs * steps_per_epoch).to(device, memory_format=torch.channels_last)
    images = [
        create_dataset("torch/fashion_mnist", args.data_dir, split=split, download=args.download)
        for split in ("train", "validation")
    ]
    loaders = [
        create_loader(
            Pairs(dataset) if args.pairs else dataset,
            batch_size=args.batch_size if split == "train" else 500,
            is_training=split == "train",
            no_aug=True,
            **DATA,
            num_workers=0,
            persistent_workers=False,
            device=device,
        )
        for split, dataset in zip(("train", "validation"), images, strict=True)
    ]
    random_seed(run.seed)
    rates = RATES[run.optimizer]
    optimizer = create_optimizer_v2(model, run.optimizer, lr=rates[run.start], **OPTIMIZERS[run.optimizer])
    if run.variant == ALL_GATES:
        optimizer.register_step_pre_hook(lambda *_: spread_slopes(model))  # runs after the hook that adds the term
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=rates["warmup"],
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    average = ModelEmaV3(model, decay=0.99)
    loss_fn = nn.CrossEntropyLoss()
    pattern = gate_pattern(model)
    top1: list[float] = []
    flips: list[int] = []
    step = 0
    for _ in range(epochs):
        model.train()
        flips.append(0)
        for images, labels in itertools.islice(loaders[0], steps_per_epoch):
            loss = loss_fn(model(images.contiguous(memory_format=torch.channels_last)), labels)
            if run.variant == "paper":
                loss = constrained_loss(loss, model, run.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=step)
            step += 1
            scheduler.step_update(step)
            before, pattern = pattern, gate_pattern(model)
            flips[-1] += int((before != pattern).sum())
        top1.append(round(demo.evaluate(model, loaders[1], device)[0], 2))
    averaged = round(demo.evaluate(average.module, loaders[1], device)[0], 2)
    if (run.start, run.variant) == ("scratch", "dense"):
        torch.save(model.state_dict(), saved)
    if args.costs:  # to measure times
        torch.save(reparameterize_model(model.eval()), args.output / file_name(run))
    result = dict(top1=top1, top1_averaged=averaged, flips=flips, seconds=round(time.monotonic() - start))
    return {**run._asdict(), **result, **snapshot(model, run.variant in PRUNED)}


def file_name(run: Run) -> str:
    """Return the name of the file with the deployed network of a run."""
    return f"{run.model} {run.start} {run.variant} {run.target} {run.seed}.pt"


def measure(rows: list[bench.Row], folder: Path, rounds: int) -> None:
    """Write the times of all deployed networks into their rows, as ratios to the dense network of the same seed."""
    torch.set_num_threads(1)
    for (name, batch_size), seed in itertools.product(PROGRAMS, sorted({row["seed"] for row in rows})):
        found = {n: row for n, row in enumerate(rows) if row["seed"] == seed}
        images = torch.randn(batch_size, *DATA["input_size"])
        calls: dict[Any, Any] = {}
        for n, row in found.items():
            net = torch.load(folder / file_name(Run(*(row[key] for key in Run._fields))), weights_only=False)
            net.to(memory_format=torch.contiguous_format)
            run = RUNTIMES[name](net, images)
            calls[n] = partial(run, images)
        with torch.inference_mode():
            times = bench.interleave(calls, rounds, "cpu", f"{name}, {batch_size}")
        (dense,) = (times[n] for n, row in found.items() if row["variant"] == "dense")
        for n, row in found.items():
            row.setdefault("times", {})[f"{name}, {batch_size}"] = bench.summary(times[n], dense)["ratio"]


def gate_pattern(model: nn.Module) -> Tensor:
    """Return which gates are closed."""
    return torch.cat([torch.empty(0), *(conv.gate.detach() for conv in dgconvs(model))]).signbit()


@torch.no_grad()
def multiply_adds(model: nn.Module) -> int:
    """Return the multiply-adds of the convolutions and linear layers for one image."""
    net = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *DATA["input_size"], device=next(net.parameters()).device))
    return counter.get_total_flops() // 2


def snapshot(model: nn.Module, pruned: bool = False) -> bench.Row:
    """Return density, groups and multiply-adds, or only the last of a pruned network."""
    if pruned:
        return {"macs": multiply_adds(model)}
    report = group_report(model)
    return {"density": round(report.density, 5), "macs": report.learned.macs, "groups": layer_groups(model)}


def select(rows: list[bench.Row], start: str, variant: str, target: float, optimizer: str = "sgd") -> list[bench.Row]:
    """Return the rows of these runs, one per seed."""
    wanted = dict(start=start, variant=variant, target=target, optimizer=optimizer)
    return [row for row in rows if wanted.items() <= row.items()]


def mean(rows: list[bench.Row], name: str) -> float:
    """Return the mean over the seeds."""
    return statistics.mean(row[name] for row in rows)


def curve(rows: list[bench.Row], name: str) -> list[float]:
    """Return the mean over the seeds for each epoch."""
    return [statistics.mean(values) for values in zip(*(row[name] for row in rows), strict=True)]


def mean_groups(rows: list[bench.Row]) -> list[float]:
    """Return the geometric mean of the groups of each layer."""
    layers = zip(*(row["groups"] for row in rows), strict=True)
    return [2 ** statistics.mean(map(math.log2, groups)) for groups in layers]


def table(rows: list[bench.Row]) -> str:
    """Format the means over the seeds, with the smallest and largest value, as a Markdown table."""

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    result = []
    names = ("start", "variant", "target", "optimizer")
    for start, variant, target, optimizer in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        seeds = select(rows, start, variant, target, optimizer)
        has_gates = variant not in PRUNED
        cells: bench.Row = {
            "optimizer": optimizer,
            "start": start,
            "target": str(Fraction(target).limit_denominator(64)),
        }
        cells |= {"variant": variant, "seeds": len(seeds)}
        cells["connections, %"] = f"{100 * mean(seeds, 'density'):.1f}" if has_gates else ""
        cells["multiply-adds, M"] = f"{mean(seeds, 'macs') / 1e6:.2f}"
        cells["top-1, %"] = spread([row["top1"][-1] for row in seeds])
        cells["of averaged weights, %"] = spread([row["top1_averaged"] for row in seeds])
        learns = variant in ARGS
        cells["flips per epoch"] = ", ".join(f"{flips:.0f}" for flips in curve(seeds, "flips")) if learns else ""
        groups = mean_groups(seeds) if has_gates else []
        for program in seeds[0].get("times", {}):
            cells[f"time, {program}"] = f"{statistics.median(row['times'][program] for row in seeds):.2f}"
        cells["groups per layer (geometric mean)"] = ", ".join(f"{n:.3g}" for n in groups)
        result.append(cells)
    return bench.table(result)


def plot(rows: list[bench.Row], path: Path) -> None:
    """Draw accuracy over multiply-adds and learned groups for both starts, and accuracy and flips over the epochs."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    epochs, flips = axes[:, 2]
    targets = sorted({row["target"] for row in rows})
    colors = {variant: f"C{n}" for n, variant in enumerate(VARIANTS)}
    titles = {"scratch": "from scratch", "dense": "from a trained dense network"}
    for (start, title), (accuracy, groups) in zip(titles.items(), axes.T, strict=False):
        for variant, marker in zip(["dense", *COMPARED, *PRUNED], "*sxo^PPPP", strict=True):
            found = [found for target in targets if (found := select(rows, start, variant, target))]
            if not found:
                continue
            ends = [[row["top1"][-1] for row in seeds] for seeds in found]
            x, y = [mean(seeds, "macs") / 1e6 for seeds in found], list(map(statistics.mean, ends))
            bars = list(zip(*[(m - min(e), max(e) - m) for m, e in zip(y, ends, strict=True)], strict=True))
            style = dict(color=colors[variant], marker=marker, linewidth=0.8, capsize=2)
            accuracy.errorbar(x, y, bars, **style, label=variant)
        accuracy.set(title=title, xlabel="multiply-adds, M", ylabel="top-1, %")
        for variant in ("held", "paper"):
            for target, line in zip(targets, ("--", "-"), strict=False):
                seeds = select(rows, start, variant, target)
                if seeds:
                    y = mean_groups(seeds)
                    style = dict(color=colors[variant], linestyle=line, marker="o", markersize=3)
                    groups.plot(range(1, len(y) + 1), y, label=f"{variant}, 1/{1 / target:.0f}", **style)
        groups.set(title=title, xlabel="layer", ylabel="groups (geometric mean)")
        groups.set_yscale("log", base=2)
        groups.yaxis.set_major_formatter("{x:g}")
    for variant in ["fixed", *LEARNED]:
        seeds = select(rows, "scratch", variant, 1 / 8)
        if seeds:
            y = curve(seeds, "top1")
            x = range(1, len(y) + 1)
            epochs.plot(x[1:], y[1:], color=colors[variant], linewidth=1, label=variant)
            if variant in LEARNED:
                flips.plot(x, curve(seeds, "flips"), color=colors[variant], linewidth=1, label=variant)
    epochs.set(title="from scratch, 1/8 of the connections", xlabel="epoch", ylabel="top-1, %")
    flips.set(title="from scratch, 1/8 of the connections", xlabel="epoch", ylabel="flips of gates", yscale="symlog")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False, handlelength=3)
    figure.savefig(path, dpi=150)


def place(row: bench.Row) -> tuple[Any, ...]:
    """Return the key by which rows are sorted."""
    ranks = [list(names).index(row[key]) for key, names in (("model", NETS), ("optimizer", OPTIMIZERS))]
    return *ranks, row["start"] == "dense", -row["target"], VARIANTS.index(row["variant"]), row["seed"]


def main() -> None:
    """Run the study, and write its table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NETS, default="g_resnext50")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("study"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=20_000, help="images per epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a small part")
    parser.add_argument("--forms", action="store_true", help="compare the forms of gates")
    parser.add_argument("--costs", action="store_true", help="compare networks with the same multiply-adds")
    parser.add_argument("--pairs", action="store_true", help="two images side by side, at half of the multiply-adds")
    parser.add_argument("--rounds", type=int, default=0, help="with --costs, measure times in so many rounds")
    parser.add_argument("--targets", type=Fraction, nargs="+", default=[Fraction(1, 8)], help="with --forms")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, help="with --forms")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.output.mkdir(exist_ok=True)
    path = args.output / f"study{'_forms' * args.forms or '_costs' * args.costs or '_pairs' * args.pairs}.json"
    rows: list[bench.Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {tuple(row[key] for key in Run._fields) for row in rows}
    wanted = [] if args.report else runs(args.model, args.seeds, args.quick)
    if args.forms and not args.report:
        wanted = form_runs(args.model, args.seeds, list(map(float, args.targets)), args.optimizers)
    elif args.costs and not args.report:
        wanted = cost_runs(args.model, args.seeds)
    elif args.pairs and not args.report:
        wanted = pair_runs(args.model, args.seeds)
    todo = [run for run in wanted if run not in done and run.variant in (args.variants or VARIANTS)]
    needed = [run for run in todo if (run.start, run.variant) == ("scratch", "dense")]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool, tqdm(total=len(todo)) as bar:
        for part in (needed, [run for run in todo if run not in needed]):
            for future in as_completed(pool.submit(train, run, args) for run in part):
                rows = sorted([*rows, future.result()], key=place)
                bench.save(rows, path, args.device)
                bar.update()
    if args.rounds:
        measure([row for row in rows if row["model"] == args.model], args.output, args.rounds)
        bench.save(rows, path, args.device)
    rows = [row for row in rows if row["model"] == args.model]
    print(table(rows))
    if args.model == "g_resnext50" and not (args.forms or args.costs or args.pairs):
        plot(rows, args.output / "study.png")


if __name__ == "__main__":
    main()
