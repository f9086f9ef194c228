"""The training loops of other libraries hold a target, or warn that they do not."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_clients import alone, batches, network
from torch import nn
from torch.nn.functional import cross_entropy

TARGET, LR = 0.1, 0.05
Result = tuple[int, float]  # the number of warnings about the loop, and the share of the connections


def steered() -> Any:
    return network(init_groups=1, complexity_target=TARGET)


def share(model: nn.Module) -> float:
    """The share of a dense network's connections, without the layers whose copies PEFT trains."""
    from timm_dgconv import DGConv2d, complexity

    used = [module for name, module in model.named_modules() if "original_module" not in name]
    convs = [module for module in used if isinstance(module, DGConv2d)]
    connections = sum(complexity(conv).item() for conv in convs)
    return connections / sum(conv.in_channels * conv.out_channels for conv in convs)


def warned(train: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return sum("without a step of a torch optimizer" in str(warning.message) for warning in caught)


def fit_with_fastai(wrapped: bool, backend: str | None) -> Result:
    from fastai.vision.all import DataLoader, DataLoaders, Learner, OptimWrapper

    model = steered()
    if backend is not None:
        model.compile(backend=backend)
    samples = [sample for x, labels in batches() for sample in zip(x, labels, strict=True)]
    loaders = DataLoaders(*(DataLoader(samples, bs=8, device="cpu") for _ in range(2)), device="cpu")
    options = {"opt_func": partial(OptimWrapper, opt=torch.optim.AdamW)} if wrapped else {}
    learner = Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), **options)

    def fit() -> None:
        with learner.no_bar(), learner.no_logging():
            learner.fit(40, LR)

    return warned(fit), share(model)


@pytest.mark.client("fastai")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_fastai_holds_the_target_with_an_optimizer_of_torch(backend: str | None) -> None:
    warnings, density = alone(fit_with_fastai, True, backend)
    assert warnings == 0
    assert density <= TARGET
    warnings, density = alone(fit_with_fastai, False, backend)
    assert warnings == 1
    assert density > TARGET


def fit_with_keras() -> Result:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from keras.layers import TorchModuleWrapper

    model = steered()
    whole = keras.Sequential([keras.Input((3, 32, 32)), TorchModuleWrapper(model)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole.compile(optimizer=keras.optimizers.Adam(LR), loss=loss)
    x, labels = (torch.cat(parts).numpy() for parts in zip(*batches(), strict=True))
    count = warned(lambda: whole.fit(x, labels, batch_size=8, epochs=5, verbose=0))
    return count, share(model)


@pytest.mark.client("keras")
def test_keras_warns() -> None:
    warnings, density = alone(fit_with_keras)
    assert warnings == 1
    assert density > TARGET


def fit_with_transformers(adapted: bool) -> Result:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

    args = {"zero_init_last": False, "init_groups": 1, "complexity_target": TARGET}
    config = TimmWrapperConfig(architecture="test_g_resnext", num_labels=4, model_args=args)
    model: Any = TimmWrapperForImageClassification(config)
    if adapted:
        import peft

        lora = peft.LoraConfig(r=4, target_modules=r".*\.conv[13]", modules_to_save=["conv2"])
        model = peft.get_peft_model(model, lora)
    pairs = [pair for x, labels in batches() for pair in zip(x, labels, strict=True)]
    samples = [{"pixel_values": x, "labels": label} for x, label in pairs]
    options = TrainingArguments(
        "out",
        use_cpu=True,
        num_train_epochs=30,
        learning_rate=LR,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return warned(Trainer(model, options, train_dataset=samples).train), share(model)


@pytest.mark.parametrize(
    "adapted",
    [
        pytest.param(False, marks=pytest.mark.client("transformers")),
        pytest.param(True, marks=pytest.mark.client("peft")),
    ],
)
def test_the_trainer_of_transformers_holds_the_target(adapted: bool) -> None:
    warnings, density = alone(fit_with_transformers, adapted)
    assert warnings == 0
    assert density <= TARGET


def fit_with_deepspeed(stage: int, holds: bool) -> tuple[int, float, float]:
    """Also return the share of the copy of the weights that DeepSpeed trains and stores."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from conftest import gates
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    from timm_dgconv import hold_target

    store = f"file://{Path('store').absolute()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    model = steered()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def fit() -> None:
        for x, labels in batches() * 10:
            engine.backward(cross_entropy(engine(x), labels))
            engine.step()
            if holds:
                hold_target(model)
                for gate in gates(model):
                    safe_set_full_fp32_param(gate, gate.detach())

    count = warned(fit)
    trained = [safe_get_full_fp32_param(gate).clone() for gate in gates(model)]
    with deepspeed.zero.GatheredParameters(gates(model), modifier_rank=0):
        density = share(model)
        for gate, values in zip(gates(model), trained, strict=True):
            gate.data.copy_(values)
        return count, density, share(model)


@pytest.mark.client("deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_warns(stage: int) -> None:
    warnings, *shares = alone(fit_with_deepspeed, stage, False)
    assert warnings == 1
    assert min(shares) > TARGET


@pytest.mark.client("deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_the_copy_of_deepspeed_can_be_held(stage: int) -> None:
    warnings, *shares = alone(fit_with_deepspeed, stage, True)
    assert warnings == 0
    assert max(shares) <= TARGET
