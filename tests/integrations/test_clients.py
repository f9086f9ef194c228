"""Libraries that build on timm know the models without an import of this package, and work with them.

    pip install -e ".[test,clients]" && pytest -m client

A program is a function that runs in a new process, in which nothing has imported timm, and torch has imported this
package. Tests of export and quantization run in the process of pytest.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

Weights = dict[str, np.ndarray[Any, Any]]


def alone(program: Callable[..., Any], *args: Any) -> Any:
    """Run a program in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_start, program, *args).result()


def _start(program: Callable[..., Any], *args: Any) -> Any:
    ours = {name for name in sys.modules if name.split(".")[0] in {"timm", "timm_dgconv"}}
    assert ours == {"timm_dgconv", "timm_dgconv._autoload"}, ours  # imported by torch
    torch.manual_seed(0)
    return program(*args)


def gates(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for name, parameter in model.named_parameters() if name.endswith("gate")]
    assert found
    return found


def weights(model: nn.Module) -> Weights:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def assert_same(found: Weights, expected: Weights) -> None:
    """Equal weights, and logits that are equal up to rounding, since the weights are elsewhere in memory."""
    assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    assert_close({**found, "logits": None}, {**expected, "logits": None}, rtol=0, atol=0)


def network(**kwargs: Any) -> Any:
    import timm

    return timm.create_model("test_g_resnext", num_classes=4, zero_init_last=False, **kwargs)


def images(size: int = 32, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Train one step, in which all gates have gradients and change."""
    before = [gate.detach().clone() for gate in gates(model)]
    loss().backward()
    assert all(gate.grad is not None and gate.grad.count_nonzero() for gate in gates(model))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not any(torch.equal(*pair) for pair in zip(gates(model), before, strict=True))


def segment(encoder: str, folder: Path) -> None:
    import segmentation_models_pytorch as smp

    model = smp.Unet(encoder, encoder_weights=None, classes=3, zero_init_last=False)
    x = images(64, 2)
    loss = smp.losses.DiceLoss(mode="multiclass")
    step(model, lambda: loss(model(x), torch.randint(3, (2, 64, 64))))
    model.eval()
    with torch.inference_mode():
        masks = model(x)
        assert masks.shape == (2, 3, 64, 64)
        model.save_pretrained(folder)
        again = smp.from_pretrained(folder).eval()
        assert_close(again(x), masks, rtol=0, atol=0)
    assert_close(gates(again), gates(model), rtol=0, atol=0)


@pytest.mark.client("segmentation-models-pytorch")
@pytest.mark.parametrize("encoder", ["tu-g_resnext50", "tu-test_g_resnext"])
def test_segmentation_models_trains_and_stores_a_unet(encoder: str, tmp_path: Path) -> None:
    alone(segment, encoder, tmp_path)


def write_with_transformers(folder: Path) -> Weights:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    args = {"zero_init_last": False, "complexity_weight": 1.0}
    config = TimmWrapperConfig(architecture="test_g_resnext", num_labels=4, model_args=args)
    model = TimmWrapperForImageClassification(config)
    step(model, lambda: model(images(), labels=torch.arange(4)).loss)
    model.eval().save_pretrained(folder)
    logits = model(images()).logits
    return {"logits": logits.detach().numpy(), **weights(model.timm_model)}


def read_with_transformers(folder: Path) -> Weights:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits = model(images()).logits
    return {"logits": logits.detach().numpy(), **weights(model.timm_model)}


def write_with_convert(folder: Path, compact: bool) -> Weights:
    """Write a folder as it is on the Hub."""
    import timm
    from conftest import trained

    from timm_dgconv.hub.convert import convert

    torch.save(trained().state_dict(), "model.pth")
    convert("model.pth", "test_g_resnext.untrained", folder, compact=compact)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return {"logits": model(images()).detach().numpy(), **weights(model)}


@pytest.mark.client("transformers")
def test_transformers_trains_saves_and_loads(tmp_path: Path) -> None:
    written = alone(write_with_transformers, tmp_path)
    assert_same(alone(read_with_transformers, tmp_path), written)


@pytest.mark.client("transformers")
@pytest.mark.parametrize("compact", [False, True])
def test_transformers_loads_what_convert_wrote(compact: bool, tmp_path: Path) -> None:
    written = write_with_convert(tmp_path / "model", compact)
    assert_same(alone(read_with_transformers, tmp_path / "model"), written)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(4)
    ]


def fit_with_torch(epochs: int, accumulate: int = 1) -> Weights:
    """The expected weights: the logarithm of the complexity is in the loss once per step."""
    from timm_dgconv import complexity

    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index, (x, labels) in enumerate(batches() * epochs, 1):
        (cross_entropy(model(x), labels) / accumulate).backward()
        if index % accumulate == 0:
            (0.1 * complexity(model).log()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def fit_with_lightning(folder: Path, epochs: int, checkpoint: Path | None) -> Weights:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network(complexity_weight=0.1)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, labels = batch
            return cross_entropy(self.model(x), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, "last")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=checkpoint)
    return weights(module.model)


@pytest.mark.client("lightning")
def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    alone(fit_with_lightning, tmp_path, 2, None)
    resumed = alone(fit_with_lightning, tmp_path / "on", 3, tmp_path / "last.ckpt")
    assert_close(resumed, fit_with_torch(3), rtol=1e-3, atol=1e-5)


def fit_with_accelerate(epochs: int, accumulate: int) -> Weights:
    import accelerate

    model = network(complexity_weight=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(epochs):
        for x, labels in batches():
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), labels))
                optimizer.step()
                optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


@pytest.mark.client("accelerate")
def test_accelerate_accumulates() -> None:
    assert_close(alone(fit_with_accelerate, 2, 2), fit_with_torch(2, accumulate=2), rtol=1e-3, atol=1e-5)


def fit_with_fastai(folder: Path) -> None:
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, load_learner, vision_learner
    from PIL import Image

    random = np.random.default_rng(0)
    for label in ("even", "odd"):
        (folder / "images" / label).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{index}.png")
    loaders = ImageDataLoaders.from_folder(
        folder / "images", valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), num_workers=0, device="cpu"
    )
    learner = vision_learner(loaders, "test_g_resnext", pretrained=False, metrics=accuracy, zero_init_last=False)
    before = [gate.detach().clone() for gate in gates(learner.model)]
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(2, 1e-3)
        learner.export(folder / "learner.pkl")
    assert not any(torch.equal(*pair) for pair in zip(gates(learner.model), before, strict=True))
    assert_close(gates(load_learner(folder / "learner.pkl").model), gates(learner.model), rtol=0, atol=0)


def adapt_the_1x1_convolutions(folder: Path) -> None:
    import peft

    def base() -> nn.Module:
        torch.manual_seed(0)
        return network().eval()

    config = peft.LoraConfig(r=4, target_modules=r".*\.conv[13]", modules_to_save=["fc", "conv2"])
    model = peft.get_peft_model(base(), config)
    learning = [gate for gate in gates(model) if gate.requires_grad]
    assert len(learning) == len(gates(base()))
    before = [gate.detach().clone() for gate in learning]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cross_entropy(model(images()), torch.arange(4)).backward()
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(learning, before, strict=True))
    expected = model(images())
    model.save_pretrained(folder)
    assert_close(peft.PeftModel.from_pretrained(base(), folder)(images()), expected)


PROGRAMS: dict[Callable[[Path], None], str] = {
    fit_with_fastai: "fastai",
    adapt_the_1x1_convolutions: "peft",
}


@pytest.mark.parametrize(
    "program", [pytest.param(p, marks=pytest.mark.client(name), id=p.__name__) for p, name in PROGRAMS.items()]
)
def test_a_library_works_with_the_models(program: Callable[[Path], None], tmp_path: Path) -> None:
    alone(program, tmp_path)


FORMS = ["learnable", "compact", "deployed"]


def in_form(form: str) -> nn.Module:
    from conftest import trained
    from timm.utils import reparameterize_model

    from timm_dgconv import compact

    model = trained(num_classes=10).eval()
    return {"learnable": lambda model: model, "compact": compact, "deployed": reparameterize_model}[form](model)


@pytest.mark.client("onnxruntime")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_runtime_computes_the_same(form: str, dynamo: bool, tmp_path: Path) -> None:
    import onnxruntime

    model, path = in_form(form), tmp_path / "model.onnx"
    dynamic: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}, "logits": {0: "batch"}}}
    if dynamo:
        dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch", max=64)},)}
    torch.onnx.export(model, (images(64),), path, dynamo=dynamo, input_names=["x"], output_names=["logits"], **dynamic)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 4, 7):
        x = images(64, count)
        (logits,) = session.run(None, {"x": x.numpy()})
        assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.client("openvino")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["compact", "deployed"])
def test_openvino_computes_the_same(form: str) -> None:
    """OpenVINO has no rule for the operators that read gates."""
    import openvino

    model = in_form(form)
    network = openvino.convert_model(model, example_input=images(64))
    run = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 4, 7):
        x = images(64, count)
        assert_close(torch.from_numpy(run(x.numpy())[0]), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.client("openvino")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_page_about_deployment_runs_as_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO computes in bfloat16 on processors that have it."""
    import timm
    from test_docs import deploy_programs

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, zero_init_last=False))
    names: dict[str, Any] = {}
    programs = deploy_programs()
    tolerances = {"timm": 0, "torch": 0, "onnxruntime": 1e-4, "openvino": 0.05}
    for tool, tolerance in (tolerances | dict.fromkeys(("torchao int8", "nncf int8", "onnxruntime int8"), 0.2)).items():
        exec(compile(programs[tool], tool, "exec"), names)
        if tolerance:
            expected = names["model"](names["images"]).detach()
            outputs = torch.as_tensor(names["outputs"])
            assert_close(outputs, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def run_exported(paths: list[Path]) -> list[list[np.ndarray[Any, Any]]]:
    programs = [torch.export.load(path).module() for path in paths]
    assert "timm" not in sys.modules
    assert "timm_dgconv.layers.dgconv" not in sys.modules
    return [[program(images(64, count)).detach().numpy() for count in (1, 4, 7)] for program in programs]


@pytest.mark.client("torch")
def test_exported_files_run_without_timm_and_the_layers_of_this_package(tmp_path: Path) -> None:
    models = [in_form(form) for form in FORMS]
    paths = [tmp_path / f"{form}.pt2" for form in FORMS]
    batch = torch.export.Dim("batch", max=64)
    for model, path in zip(models, paths, strict=True):
        program = torch.export.export(model, (images(64),), dynamic_shapes={"x": {0: batch}}, strict=False)
        torch.export.save(program, path)
    expected = [[model(images(64, count)).detach().numpy() for count in (1, 4, 7)] for model in models]
    assert_close(alone(run_exported, paths), expected, rtol=1e-4, atol=1e-4)
