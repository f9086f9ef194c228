"""Compare learned groups with fixed groups, random groups and pruning on Fashion-MNIST.

    python benchmarks/study.py --data-dir data            # everything
    python benchmarks/study.py --data-dir data --quick    # one seed from scratch at 1/8 of the connections
    python benchmarks/study.py --report                   # table and figure of the finished runs

`--data-dir` is the folder with FashionMNIST/raw, as torchvision writes it. `--download` fetches the images. The files
of Debian's package dataset-fashion-mnist work, too:

    mkdir -p data/FashionMNIST/raw && cp /usr/share/datasets/fashion-mnist/*.gz data/FashionMNIST/raw
    gunzip data/FashionMNIST/raw/*.gz

Each finished run is one row of study.json in `--output`, and a second call skips it. The pruned networks need
torch-pruning.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import bench
import timm
import torch
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, random_seed
from torch import nn

from timm_dgconv import compact, constrained_loss, demo, group_report, layer_groups
from timm_dgconv.layers.dgconv import PRETRAINED_GATE, DGConv2d

NET: dict[str, Any] = dict(
    in_chans=1,
    num_classes=10,
    layers=(2, 2, 2, 2),
    channels=(16, 16, 32, 64),  # 3x3 layers of 32, 32, 64 and 128 channels
    pretrained_cfg_overlay=dict(input_size=(1, 28, 28), crop_pct=1.0, mean=(0.286,), std=(0.353,)),
)
TARGET, SETTLED = object(), object()
BOUNDED, STEPS = dict(gate_bound=0.05), dict(gate_steps=SETTLED)
LEARNED: dict[str, dict[str, Any]] = {
    "held": dict(complexity_target=TARGET),
    "paper": dict(),
    "held, bounded": dict(complexity_target=TARGET, **BOUNDED),
    "held, bounded, settled": dict(complexity_target=TARGET, **BOUNDED, **STEPS),
    "held, from groups": dict(complexity_target=TARGET, init_groups=8),
}
"""Variants with gates that learn, with arguments of `timm.create_model`. "paper" minimises `constrained_loss`."""
COMPARED = ["fixed", "random", "held", "paper"]
VARIANTS = ["dense", *COMPARED, "pruned", *(name for name in LEARNED if name not in COMPARED)]
SETTLE = 0.6
"""The part of the training after which settled gates stand still."""


class Run(NamedTuple):
    """One training: from scratch, or from the dense network of the same seed."""

    start: str
    variant: str
    target: float
    seed: int


def runs(seeds: Sequence[int], quick: bool) -> list[Run]:
    """Return all runs, the most important ones first."""
    names = [("scratch", "dense", 1.0), *(("scratch", name, 1 / 8) for name in COMPARED)]
    if quick:
        return [Run(*name, seeds[0]) for name in names]
    names += [("dense", "dense", 1.0), *(("dense", name, 1 / 8) for name in [*COMPARED, "pruned"])]
    names += [("scratch", name, 1 / 32) for name in ("fixed", "held", "paper")]
    names += [("dense", name, 1 / 32) for name in ("fixed", "held", "pruned")]
    names += [("scratch", name, 1 / 8) for name in LEARNED if name not in COMPARED]
    return [Run(*name, seed) for name in names for seed in seeds]


def build(run: Run, dense: dict[str, torch.Tensor], steps: int) -> nn.Module:
    """Return the network at the beginning of a run.

    Args:
        run: What to train.
        dense: State dict of the trained dense network, or an empty dictionary.
        steps: Number of optimizer steps of the run.
    """
    random_seed(run.seed)
    values = {TARGET: run.target, SETTLED: round(SETTLE * steps)}
    kwargs = {key: values.get(value, value) for key, value in LEARNED.get(run.variant, {}).items()}
    model = timm.create_model("g_resnext50", **kwargs, **NET)
    if dense:
        model.load_state_dict(dense)
        set_gates(model)
    if run.variant == "pruned":
        return prune(model, run)
    if run.variant not in LEARNED:
        set_gates(model)
        close_gates(model, run.target, shuffle=run.variant == "random")
        return compact(model)
    return model


def dgconvs(model: nn.Module) -> list[DGConv2d]:
    """Return the DGConv2d layers."""
    return [module for module in model.modules() if isinstance(module, DGConv2d)]


def set_gates(model: nn.Module) -> None:
    """Open all gates."""
    for conv in dgconvs(model):
        conv.reset_gate(1)


@torch.no_grad()
def close_gates(model: nn.Module, density: float, shuffle: bool) -> None:
    """Close gates to reach a density: the first ones of each layer, or random ones as long as they are needed."""
    if not shuffle:
        for conv in dgconvs(model):
            conv.reset_gate(round(1 / density))
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
    """Prune the channels of smallest magnitude, to the multiply-adds of fixed groups at the target."""
    import torch_pruning

    example = torch.zeros(1, *NET["pretrained_cfg_overlay"]["input_size"])
    plain = compact(model)
    grouped = build(run._replace(variant="fixed"), {}, 1)
    goal, _ = torch_pruning.utils.count_ops_and_params(grouped, example)

    def pruned(ratio: float) -> tuple[float, nn.Module]:
        result = copy.deepcopy(plain)
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.BasePruner(
            result, example, importance, pruning_ratio=ratio, global_pruning=False, ignored_layers=[result.fc]
        ).step()
        return torch_pruning.utils.count_ops_and_params(result, example)[0], result

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if pruned(middle)[0] <= goal else (middle, high)
    return pruned(high)[1]


def train(run: Run, args: argparse.Namespace) -> bench.Row:
    """Train with timm's parts, and return the row of the run."""
    torch.set_num_threads(1)
    start = time.monotonic()
    device = torch.device(args.device)
    saved = args.output / f"dense-{run.seed}.pt"
    dense = torch.load(saved) if run.start == "dense" else {}
    epochs = args.epochs if run.start == "scratch" else args.epochs // 2
    steps_per_epoch = args.images // args.batch_size
    model = build(run, dense, epochs * steps_per_epoch).to(device, memory_format=torch.channels_last)
    config = NET["pretrained_cfg_overlay"]
    loaders = [
        create_loader(
            create_dataset("torch/fashion_mnist", args.data_dir, split=split, download=args.download),
            input_size=config["input_size"],
            batch_size=args.batch_size if split == "train" else 500,
            is_training=split == "train",
            no_aug=True,
            crop_pct=config["crop_pct"],
            mean=config["mean"],
            std=config["std"],
            num_workers=0,
            persistent_workers=False,
            device=device,
        )
        for split in ("train", "validation")
    ]
    random_seed(run.seed)
    optimizer = create_optimizer_v2(
        model, "sgd", lr=0.1 if run.start == "scratch" else 0.02, weight_decay=5e-4, momentum=0.9
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=1e-3,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    average = ModelEmaV3(model, decay=0.99)
    loss_fn = nn.CrossEntropyLoss()
    pattern = gate_pattern(model)
    history: list[bench.Row] = [snapshot(model, flips=0)]
    step = 0
    for _ in range(epochs):
        model.train()
        meter, flips = AverageMeter(), 0
        for images, labels in islice(loaders[0], steps_per_epoch):
            loss = loss_fn(model(images.contiguous(memory_format=torch.channels_last)), labels)
            meter.update(loss.item(), labels.numel())
            if run.variant == "paper":
                loss = constrained_loss(loss, model, run.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=step)
            step += 1
            scheduler.step_update(step)
            before, pattern = pattern, gate_pattern(model)
            flips += int((before != pattern).sum())
        top1, _ = demo.evaluate(model, loaders[1], device)
        averaged, _ = demo.evaluate(average.module, loaders[1], device)
        history.append(snapshot(model, flips=flips, loss=meter.avg, top1=top1, top1_averaged=averaged))
    if (run.start, run.variant) == ("scratch", "dense"):
        torch.save(model.state_dict(), saved)
    return {**run._asdict(), "history": history, "seconds": time.monotonic() - start}


def gate_pattern(model: nn.Module) -> torch.Tensor:
    """Return which gates are closed."""
    return torch.cat([torch.empty(0), *(conv.gate.detach() for conv in dgconvs(model))]).signbit()


def snapshot(model: nn.Module, **values: Any) -> bench.Row:
    """Return density, groups and multiply-adds, beside other values."""
    report = group_report(model)
    return {"density": report.density, "groups": layer_groups(model), "macs": report.learned.macs, **values}


def select(rows: list[bench.Row], start: str, variant: str, target: float) -> list[list[bench.Row]]:
    """Return the histories of these runs, one per seed."""
    return [row["history"] for row in rows if (row["start"], row["variant"], row["target"]) == (start, variant, target)]


def mean(histories: list[list[bench.Row]], name: str, epoch: int = -1) -> float:
    """Return the mean over the seeds."""
    return statistics.mean(history[epoch][name] for history in histories)


def mean_groups(histories: list[list[bench.Row]]) -> list[float]:
    """Return the geometric mean of the groups of each block."""
    blocks = zip(*(history[-1]["groups"] for history in histories), strict=True)
    return [2 ** statistics.mean(map(math.log2, groups)) for groups in blocks]


def table(rows: list[bench.Row]) -> str:
    """Format the means over the seeds, with the smallest and largest value, as a Markdown table."""
    lines = [
        "| start | target | variant | seeds | connections, % | multiply-adds, M | top-1, % | of averaged weights, % "
        "| flips per epoch | groups per block (geometric mean) |",
        f"|{'---|' * 10}",
    ]
    for start, target, variant in dict.fromkeys((row["start"], row["target"], row["variant"]) for row in rows):
        histories = select(rows, start, variant, target)
        cells = [start, f"1/{1 / target:.0f}", variant, str(len(histories))]
        has_gates = variant != "pruned"
        cells.append(f"{100 * mean(histories, 'density'):.1f}" if has_gates else "")
        cells.append(f"{mean(histories, 'macs') / 1e6:.2f}")
        for name in ("top1", "top1_averaged"):
            values = [history[-1][name] for history in histories]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        epochs = range(1, len(histories[0]))
        learns = variant in LEARNED
        cells.append(", ".join(f"{mean(histories, 'flips', n):.0f}" for n in epochs) if learns else "")
        cells.append(", ".join(f"{groups:.3g}" for groups in mean_groups(histories)) if has_gates else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[bench.Row], path: Path) -> None:
    """Draw accuracy over density for both starts, accuracy and flips over the epochs, and the learned groups."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    (scratch, dense), (epochs, groups) = figure.subplots(2, 2)
    flips = epochs.twinx()
    targets = sorted({row["target"] for row in rows})
    titles = {"scratch": "from scratch", "dense": "from a dense network that was trained before"}
    for axis, start in ((scratch, "scratch"), (dense, "dense")):
        for variant, marker in zip(["dense", *COMPARED, "pruned"], "*sxo^P", strict=True):
            points = [(target, select(rows, start, variant, target)) for target in targets]
            points = [(target, histories) for target, histories in points if histories]
            if points:
                x = [100 * (target if variant == "pruned" else mean(h, "density")) for target, h in points]
                y = [mean(histories, "top1") for _, histories in points]
                ends = [[history[-1]["top1"] for history in histories] for _, histories in points]
                bars = [[m - min(e) for m, e in zip(y, ends)], [max(e) - m for m, e in zip(y, ends)]]  # noqa: B905
                axis.errorbar(x, y, bars, marker=marker, markersize=6, linewidth=0.8, capsize=2, label=variant)
        axis.set(xscale="log", title=titles[start], xlabel="connections, % of dense", ylabel="top-1, %")
        axis.xaxis.set_major_formatter("{x:g}")
    for n, variant in enumerate(["fixed", *LEARNED]):
        histories = select(rows, "scratch", variant, 1 / 8)
        if histories:
            x = list(range(1, len(histories[0])))
            epochs.plot(x, [mean(histories, "top1", e) for e in x], color=f"C{n}", linewidth=1, label=variant)
            if variant in LEARNED:
                y = [mean(histories, "flips", e) for e in x]
                flips.plot(x, y, color=f"C{n}", linewidth=1, linestyle=":")
    epochs.set(title="from scratch, 1/8 of the connections", xlabel="epoch", ylabel="top-1, %")
    flips.set(ylabel="flips (dotted)", yscale="symlog")
    for n, (start, target) in enumerate((start, target) for start in titles for target in targets):
        for variant, line in (("held", "-"), ("paper", "--")):
            histories = select(rows, start, variant, target)
            if histories:
                label = f"{variant}, {titles[start][:12]}, 1/{1 / target:.0f}"
                y = mean_groups(histories)
                groups.plot(
                    range(1, len(y) + 1), y, color=f"C{n}", marker="o", markersize=3, linestyle=line, label=label
                )
    groups.set(title="learned groups", xlabel="block", ylabel="groups (geometric mean)")
    groups.set_yscale("log", base=2)
    groups.yaxis.set_major_formatter("{x:g}")
    for axis in (scratch, dense, epochs, groups):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=200)


def main() -> None:
    """Run the study, and write its table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("study"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=20_000, help="images per epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a small part")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.output.mkdir(exist_ok=True)
    path = args.output / "study.json"
    rows: list[bench.Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {tuple(row[key] for key in Run._fields) for row in rows}
    wanted = [] if args.report else runs(args.seeds, args.quick)
    todo = [run for run in wanted if run not in done and run.variant in (args.variants or VARIANTS)]
    needed = [run for run in todo if (run.start, run.variant) == ("scratch", "dense")]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool, tqdm(total=len(todo)) as bar:
        for part in (needed, [run for run in todo if run not in needed]):
            for future in as_completed(pool.submit(train, run, args) for run in part):
                rows.append(future.result())
                bench.save(rows, path, args.device)
                bar.update()
    rows.sort(key=lambda row: (row["start"] == "dense", -row["target"], VARIANTS.index(row["variant"]), row["seed"]))
    print(table(rows))
    plot(rows, args.output / "study.png")


if __name__ == "__main__":
    main()
