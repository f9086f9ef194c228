"""The model of a checkpoint: its architecture, and the model with its weights."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn

from timm_dgconv import _compat
from timm_dgconv.hub.checkpoint import SAVE, fetch, read
from timm_dgconv.hub.errors import one_line
from timm_dgconv.layers.checkpoints import GATE_NAMES
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.models.base_models import ARCHITECTURES
from timm_dgconv.models.group_net import TRAINING_ARGS
from timm_dgconv.optim.complexity import complexity
from timm_dgconv.optim.cost import named_layers

BASELINE = "resnext50_32x4d.dgconv_in1k"
"""The ResNeXt that the original release trained for comparison. timm loads it without this package."""

RESNEXT_PAPER = ("Aggregated Residual Transformations for Deep Neural Networks", "arXiv:1611.05431")

_NO_NETWORK_ARGS = {*TRAINING_ARGS, "in_chans", "num_classes", *inspect.signature(timm.create_model).parameters}
"""Arguments that do not change the network of a checkpoint: the weights tell the number of channels and classes."""

_TARGET_ARGS = {"complexity_target", "complexity_unit", "img_size"}

_LAYER = re.compile(r"(|.*\.)(?:layer\d\.\d+|features\.denseblock\d\.denselayer\d+)\.conv2\.(?:conv\.)?weight")
"""The name of a layer that learns its groups, after the prefix that a wrapper adds."""


def resolve(model_name: str) -> tuple[str, Any]:
    """Return architecture and pretrained_cfg of a model name. An unknown tag gets the data settings of the default tag.

    Raises:
        ValueError: If the name is not an architecture of this package with a tag, nor `BASELINE`.
    """
    architecture, _, tag = model_name.partition(".")
    if model_name == BASELINE:
        title, paper = RESNEXT_PAPER
        own: dict[str, Any] = dict(architecture=architecture, hf_hub_id=None, paper_name=title, paper_ids=paper)
        cfg = dataclasses.replace(timm.get_pretrained_cfg("g_resnext50.dgconv_in1k"), **own)
    elif architecture in ARCHITECTURES and not tag:
        raise ValueError(f"model {model_name!r} has no tag, the name of its weights; use {model_name}.TAG")
    elif architecture not in ARCHITECTURES or not re.fullmatch(r"[\w-]+", tag, re.ASCII):
        raise ValueError(f"unknown model {model_name!r}; use {'.TAG, '.join(ARCHITECTURES)}.TAG or {BASELINE}")
    elif model_name in get_arch_pretrained_cfgs(architecture):
        cfg = timm.get_pretrained_cfg(model_name)
    else:
        no_source: dict[str, Any] = dict.fromkeys(("hf_hub_id", "license", "origin_url", "paper_name", "paper_ids"))
        cfg = dataclasses.replace(timm.get_pretrained_cfg(architecture), tag=tag, url="", **no_source)
    return architecture, cfg


def create(architecture: str, cfg: Any, /, num_classes: int, in_chans: int = 3, **model_kwargs: Any) -> nn.Module:
    """Create a model without weights.

    Raises:
        ValueError: If the architecture cannot be built with these arguments.
    """
    cfg = dataclasses.replace(cfg, num_classes=num_classes)
    if in_chans != 3:  # without `first_conv` timm does not adapt the first convolution to `in_chans`
        cfg = dataclasses.replace(cfg, input_size=(in_chans, *cfg.input_size[1:]), first_conv=None)
        model_kwargs["in_chans"] = in_chans
    try:
        return timm.create_model(architecture, pretrained_cfg=cfg, num_classes=num_classes, **model_kwargs)
    except Exception as error:  # any exception of timm's constructors
        raise ValueError(
            f"{architecture} cannot be built with {model_kwargs}: {one_line(error)}; use other --model-kwargs"
        ) from error


def _with_data_args(cfg: Any, args: dict[str, Any]) -> Any:
    """Return a pretrained_cfg with the data settings of a training, and the labels and license of a config.json."""
    names = ("label_names", "label_descriptions", "license")
    cfg = dataclasses.replace(cfg, **{name: args.get(name) for name in names if getattr(cfg, name) is None})
    try:
        data_config = timm.data.resolve_data_config(args, pretrained_cfg=cfg.to_dict())
    except (AssertionError, TypeError):  # arguments of another script than timm's
        return cfg
    if data_config["input_size"][1:] != cfg.input_size[1:]:
        cfg = dataclasses.replace(cfg, test_input_size=None, test_crop_pct=None)
    return dataclasses.replace(cfg, **data_config)


class Checkpoint:
    """A checkpoint file and the arguments of its model, which `model_kwargs` override.

    The source is as `fetch` takes it, and `cfg` is the pretrained_cfg of the architecture.

    Raises:
        ValueError: If the source is not a checkpoint.
        RuntimeError: If the Hub does not return it.
    """

    def __init__(
        self, source: str, architecture: str, cfg: Any, use_ema: bool, model_kwargs: Mapping[str, Any] | None
    ) -> None:
        self.source, self.architecture = source, architecture
        if vain := [f"{name}={value}" for name, value in (model_kwargs or {}).items() if name in _NO_NETWORK_ARGS]:
            raise ValueError(f"{', '.join(vain)} does not change the network of a checkpoint; leave it out")
        state_dict, info = read(fetch(source), source, use_ema)
        self.cfg = _with_data_args(cfg, info.data_args)
        self.epoch = info.epoch
        compiled = f"{_compat.COMPILED}."
        self.state_dict = self._unwrap({name.replace(compiled, ""): value for name, value in state_dict.items()})
        self.target = {name: info.model_kwargs[name] for name in _TARGET_ARGS & info.model_kwargs.keys()}
        args = {**info.model_kwargs, **(model_kwargs or {})}.items()
        self.model_kwargs = {k: value for k, value in args if k not in _NO_NETWORK_ARGS and value is not None}
        if any(name.endswith((".in_order", ".out_order")) for name in self.state_dict):
            raise ValueError(
                f"{source} is the compact form of timm-dgconv 0.2 with orders of channels, which later versions do not "
                "have; use the checkpoint that it was made from"
            )
        if self.model_kwargs.get("sort"):  # timm-dgconv 0.2 had one name for both readings of gates
            gates = re.compile(r"(^|\.)gate$")
            self.state_dict = {gates.sub(r"\1sorted_gate", name): value for name, value in self.state_dict.items()}

    def _unwrap(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the network without the prefix of DistributedDataParallel, Lightning and others.

        What a wrapper has beside a whole network is left out: a loss, or the counter of torch's AveragedModel.

        Raises:
            ValueError: If there are several networks, or if a wrapper has its own classifier.
        """
        prefixes = sorted({match[1] for match in map(_LAYER.fullmatch, state_dict) if match})
        if not any(prefixes):
            return state_dict
        prefix = prefixes[0]
        if prefixes[1:]:
            raise ValueError(f"{self.source} has several networks, {one_line(', '.join(prefixes))}; {SAVE}")
        beside = [one_line(name) for name in state_dict if not name.startswith(prefix)]
        if beside and f"{prefix}{self.cfg.classifier}.weight" not in state_dict:
            raise ValueError(f"{self.source} has {beside[0]}, and no classifier in {one_line(prefix)}*; {SAVE}")
        return {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}

    def load(self) -> nn.Module:
        """Return the model with the weights of the checkpoint.

        Raises:
            ValueError: If the weights belong to another network.
        """
        # A plain ResNeXt has no weights between its groups. These keep their initial values, with a fixed seed.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = self._create()
        try:
            missing, unexpected = model.load_state_dict(self.state_dict, strict=False)
            problems = [f"it has no {name}" for name in missing]
            problems += [f"{self.architecture} has no {name}" for name in unexpected]
        except RuntimeError as error:  # other shapes
            problems = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise ValueError(
                f"{self.source} is a checkpoint of another network than {self.architecture}: "
                f"{one_line(problems[0])}{more}; use the --model and --model-kwargs of its training"
            )
        return model

    def warn_above_target(self, model: nn.Module) -> None:
        """Warn if the loaded model costs more than the target of its training, as an average of models may."""
        unit = self.target.get("complexity_unit", "connections")
        is_known = unit in ("connections", "macs") or Path(unit).is_file()
        has_gates = any(isinstance(module, DGConv2d) for module in model.modules())
        if self.target.get("complexity_target") is None or not is_known or not has_gates:
            return
        steered: Any = self._create(**self.target)
        steered.load_state_dict(model.state_dict())
        steering = next(layer.steered.steering for layer in named_layers(steered).values())
        share = complexity(steered, steering.cost).item() / steering.cost.dense
        if share > steering.target * (1 + 1e-6):
            warnings.warn(
                f"{self.source} costs {share:.3f} of the dense network's {unit}, and its training had "
                f"complexity_target={steering.target:.3g}; an average of models may exceed a target: use --no-ema, or "
                "timm_dgconv.hold_target (docs/steering.md, Average models)",
                stacklevel=3,
            )

    def load_groups(self) -> nn.Module:
        """Return the model, with plain group convolutions where the checkpoint has them; raises as `load` does."""
        model = self.load()
        for name, conv in list(model.named_modules()):
            weight = self.state_dict.get(f"{name}.weight")
            has_gates = any(f"{name}.{gate}" in self.state_dict for gate in ("gate", *GATE_NAMES.values()))
            if isinstance(conv, DGConv2d) and not has_gates and weight is not None:
                conv.to_group_conv_(conv.in_channels // weight.shape[1])
        return model

    def _create(self, **steering: Any) -> nn.Module:
        """Create the model, steered or not. The weights determine the number of classes and of input channels."""
        head = self.state_dict.get(f"{self.cfg.classifier}.weight")
        first = self.cfg.first_conv.removesuffix(".0")  # timm names the first of three convolutions conv1.0
        stem = self.state_dict.get(f"{first}.weight", self.state_dict.get(f"{first}.0.weight"))
        num_classes = 0 if head is None else self.cfg.num_classes if head.ndim != 2 else len(head)
        in_chans = 3 if stem is None or stem.ndim != 4 else stem.shape[1]
        return create(self.architecture, self.cfg, num_classes, in_chans, **self.model_kwargs, **steering)
