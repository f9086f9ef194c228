"""Training that goes on from a checkpoint in another process."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from conftest import gates, trained
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from torch import nn
from torch.utils._pytree import tree_flatten

STEPS = 20

TRAIN = f"""
    import sys, timm, torch
    from timm.models import load_checkpoint, resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, ModelEmaV3
    from torch import nn
    from timm_dgconv import DGConv2d, freeze_groups

    folder, start, weight, *names = sys.argv[1:]
    start = int(start)
    for name in names:  # options of a training, joined by dashes
        torch.manual_seed(start)  # other values, which a checkpoint must replace
        model = timm.create_model(
            "test_g_resnext", num_classes=3, zero_init_last=False, drop_path_rate=0.1,
            complexity_weight=float(weight), complexity_target=0.3 if float(weight) else None,
        )
        gates = [module.gate for module in model.modules() if isinstance(module, DGConv2d)]
        with torch.no_grad():
            for gate in gates:
                gate.mul_(1e5)  # 0.001 from zero
        if "channels_last" in name:
            model.to(memory_format=torch.channels_last)
        rate = 0.002 if "adamw" in name else 0.1
        optimizer = create_optimizer_v2(model, opt=name.split("-")[0], lr=rate, weight_decay=0.01)
        file = f"{{folder}}/{{name}}/checkpoint-{{start - 1}}.pth.tar"
        if start:
            assert resume_checkpoint(model, file, optimizer, log_info=False) == start
        average = ModelEmaV3(model, decay=0.8)
        if start:
            load_checkpoint(average.module, file, use_ema=True)
        saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=f"{{folder}}/{{name}}")
        trained = torch.compile(model, backend="aot_eager") if "compiled" in name else model
        signs = []
        for step in range(start, {STEPS}):
            if "frozen" in name and 5 <= step < 15:
                freeze_groups(model)
            elif "frozen" in name:
                freeze_groups(model, frozen=False)
            torch.manual_seed(step)
            x, y = torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained.train()(x), y).backward()
            optimizer.step()
            average.update(model)
            signs.append(torch.cat(gates).signbit())
            if step == {STEPS} // 2 - 1:
                saver.save_checkpoint(step)
        end = [model.state_dict(), optimizer.state_dict(), average.state_dict(), signs[-10:]]
        torch.save(end, f"{{folder}}/{{name}}/from{{start}}-{{weight}}.pt")
    """


def bits_of(state: Any) -> list[Any]:
    """Return the leaves, tensors as bytes."""
    leaves, _ = tree_flatten(state)
    return [leaf.reshape(-1).view(torch.uint8).tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def ends_after_resuming(folder: Path, names: list[str], weight: float = 0.1) -> Iterator[tuple[Any, Any]]:
    """Yield the ends of trainings without a break, and of trainings that another process continues half-way."""
    for name in names:
        (folder / name).mkdir()
    for start, w in ((0, 0.1), (STEPS // 2, weight)):
        command = [sys.executable, "-c", dedent(TRAIN), folder, str(start), str(w), *names]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name in names:
        files = (folder / name / f"from{start}-{w}.pt" for start, w in ((0, 0.1), (STEPS // 2, weight)))
        yield tuple(torch.load(file, weights_only=False) for file in files)


@pytest.mark.parametrize(
    "names",
    [
        ["momentum", "adamw", "momentum-frozen"],
        pytest.param(
            ["momentum-channels_last", "lookahead_momentum", "adamw-frozen", "lookahead_momentum-frozen", "lamb"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["momentum-compiled", "adamw-compiled-channels_last"], marks=pytest.mark.slow),
    ],
    ids=",".join,
)
def test_resumes_as_if_uninterrupted(names: list[str], tmp_path: Path) -> None:
    """Parameters, buffers, gates, the state of the optimizer and the average are the same to the last bit."""
    flipped = 0
    for name, (whole, resumed) in zip(names, ends_after_resuming(tmp_path, names), strict=True):
        assert bits_of(whole) == bits_of(resumed), name
        *_, signs = resumed
        assert len(signs) == STEPS // 2
        flipped += sum(int((before != after).sum()) for before, after in itertools.pairwise(signs))
    assert flipped > 0


@pytest.mark.slow
def test_the_model_has_the_term_and_the_checkpoint_has_not(tmp_path: Path) -> None:
    ((whole, resumed),) = ends_after_resuming(tmp_path, ["momentum"], weight=0.0)
    assert bits_of(whole) != bits_of(resumed)


def test_freezes_groups_from_a_checkpoint_on(tmp_path: Path) -> None:
    """timm's optimizers leave out frozen gates, so torch refuses the state of an optimizer that had them."""

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=0.01)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()

    model = trained(num_classes=3)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    file = str(tmp_path / "last.pth.tar")
    resumed = trained(num_classes=3, freeze_groups=True)
    with pytest.raises(ValueError, match="doesn't match the size"):
        resume_checkpoint(resumed, file, optimizer_of(resumed))
    optimizer = optimizer_of(resumed)
    assert resume_checkpoint(resumed, file) == 1
    step(resumed, optimizer)
    assert bits_of(gates(resumed)) == bits_of(gates(model))
    assert not torch.equal(resumed.layer1[0].conv2.weight, model.layer1[0].conv2.weight)
