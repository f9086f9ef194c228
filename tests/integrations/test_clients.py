"""Libraries that build on timm know the models without an import of this package, and work with them.

    pip install -e ".[test,clients]" && pytest -m client

A program is a function that runs in a new process, in which nothing has imported timm, and torch has imported this
package. Tests of export and quantization run in the process of pytest.
"""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

Weights = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Skip the test if the library is missing, and keep it off the Hub."""
    (name,) = request.node.get_closest_marker("client").args
    try:
        distribution(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed; pip install 'timm-dgconv[clients]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.chdir(tmp_path)


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


def step(model: nn.Module, loss: Callable[[], Tensor], optimizer: Any = None) -> None:
    """Train one step, in which all gates have gradients and change."""
    before = [gate.detach().clone() for gate in gates(model)]
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    assert all(gate.grad is not None and gate.grad.count_nonzero() for gate in gates(model))
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(gates(model), before, strict=True))


# Segmentation.


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


# transformers.


def write_with_transformers(folder: Path) -> Weights:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    args = {"zero_init_last": False, "complexity_weight": 1.0}
    config = TimmWrapperConfig(architecture="test_g_resnext", num_labels=4, model_args=args)
    model = TimmWrapperForImageClassification(config)
    step(model, lambda: model(images(), labels=torch.arange(4)).loss)
    model.eval().save_pretrained(folder)
    logits = model(images()).logits
    return {"logits": logits.detach().numpy(), **weights(model.timm_model)}


def read_with_transformers(folder: Path, kwargs: Mapping[str, Any] = MappingProxyType({})) -> Weights:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, **kwargs).eval()
    logits = model(images()).logits
    return {"logits": logits.detach().numpy(), **weights(model.timm_model)}


def write(folder: Path, form: str) -> Weights:
    """Write a folder as it is on the Hub, with `timm-dgconv convert`, or with timm for a fine-tuned model."""
    from conftest import trained
    from timm.models import save_for_hf

    from timm_dgconv.hub.convert import convert

    model = trained(**{"num_classes": 4} if form == "fine-tuned" else {}).eval()
    if form == "fine-tuned":
        save_for_hf(model, folder, safe_serialization=True)
    else:
        torch.save(model.state_dict(), "model.pth")
        convert("model.pth", "test_g_resnext.untrained", folder, compact=form == "compact")
        model = timm_model(folder)
    return {"logits": model(images()).detach().numpy(), **weights(model)}


def timm_model(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def pictures() -> list[Any]:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(256, size=(2, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def classify(folder: Path) -> list[list[float]]:
    from transformers import pipeline

    found = pipeline("image-classification", model=str(folder))(pictures(), top_k=5)
    return [[entry["score"] for entry in scores] for scores in found]


def classify_with_timm(folder: Path) -> list[list[float]]:
    import timm

    model = timm_model(folder)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model(torch.stack([transform(picture) for picture in pictures()])).softmax(-1).topk(5).values.tolist()


@pytest.mark.client("transformers")
def test_transformers_trains_saves_and_loads(tmp_path: Path) -> None:
    written = alone(write_with_transformers, tmp_path)
    assert_same(alone(read_with_transformers, tmp_path), written)


@pytest.mark.client("transformers")
@pytest.mark.parametrize("form", ["learnable", "compact"])
def test_transformers_loads_what_convert_wrote(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    written = write(folder, form)
    assert_same(alone(read_with_transformers, folder), written)
    assert_close(alone(classify, folder), classify_with_timm(folder), rtol=1e-4, atol=1e-6)


@pytest.mark.client("transformers")
def test_transformers_loads_what_timm_saved(tmp_path: Path) -> None:
    written = write(tmp_path / "model", "fine-tuned")
    assert_same(alone(read_with_transformers, tmp_path / "model", {"model_args": {}}), written)


def use_as_backbone(folder: Path) -> None:
    from transformers import TimmBackbone, TimmBackboneConfig

    model = TimmBackbone(TimmBackboneConfig(backbone="test_g_resnext", out_indices=[2, 4]))
    assert [tuple(feature.shape) for feature in model(images()).feature_maps] == [(4, 128, 4, 4), (4, 384, 1, 1)]
    gates(model)


# Training loops.


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(4)
    ]


def fit_with_torch(epochs: int, weight: float, accumulate: int = 1) -> Weights:
    """The expected weights: the logarithm of the complexity is in the loss once per step."""
    from timm_dgconv import complexity

    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index, (x, labels) in enumerate(batches() * epochs, 1):
        (cross_entropy(model(x), labels) / accumulate).backward()
        if index % accumulate == 0:
            (weight * complexity(model).log()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def fit_with_lightning(folder: Path, epochs: int, weight: float, checkpoint: Path | None) -> Weights:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = network(complexity_weight=weight)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, labels = batch
            return cross_entropy(self.model(x), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Module(weight)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, "last")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=checkpoint)
    again = Module.load_from_checkpoint(folder / "last.ckpt")
    assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)
    return weights(module.model)


@pytest.mark.client("lightning")
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_lightning_goes_on_from_a_checkpoint(weight: float, tmp_path: Path) -> None:
    alone(fit_with_lightning, tmp_path, 2, weight, None)
    resumed = alone(fit_with_lightning, tmp_path / "on", 3, weight, tmp_path / "last.ckpt")
    assert_close(resumed, fit_with_torch(3, weight), rtol=1e-3, atol=1e-5)


def fit_with_accelerate(folder: Path, epochs: int, weight: float, accumulate: int) -> Weights:
    import accelerate

    model = network(complexity_weight=weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(epochs):
        for x, labels in batches():
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), labels))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(folder)
        with torch.no_grad():  # load_state must restore the values
            for value in model.state_dict().values():
                value.zero_()
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
        accelerator.load_state(folder)
    return weights(accelerator.unwrap_model(model))


@pytest.mark.client("accelerate")
def test_accelerate_accumulates_and_goes_on(tmp_path: Path) -> None:
    fitted = alone(fit_with_accelerate, tmp_path, 3, 0.1, 2)
    assert_close(fitted, fit_with_torch(3, 0.1, accumulate=2), rtol=1e-3, atol=1e-5)


def fit_with_fastai(folder: Path) -> None:
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, load_learner, vision_learner
    from PIL import Image

    random = np.random.default_rng(0)
    for label, colour in {"red": (200, 60, 60), "blue": (60, 60, 200)}.items():
        for index in range(12):
            path = folder / "images" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.array(colour) + random.normal(0, 20, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    loaders = ImageDataLoaders.from_folder(
        folder / "images", valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), num_workers=0, device="cpu"
    )
    learner = vision_learner(loaders, "test_g_resnext", pretrained=False, metrics=accuracy, zero_init_last=False)
    before = [gate.detach().clone() for gate in gates(learner.model)]
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(2, 1e-3)
        learner.export(folder / "learner.pkl")
        again = load_learner(folder / "learner.pkl")
        for ours, theirs in zip(again.get_preds(dl=loaders.valid), learner.get_preds(), strict=True):
            assert_close(ours, theirs, rtol=0, atol=0)
    assert not any(torch.equal(*pair) for pair in zip(gates(learner.model), before, strict=True))
    assert_close(gates(again.model), gates(learner.model), rtol=0, atol=0)


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
    with pytest.raises(TypeError, match="takes no groups"):  # LoRA would add weights between the groups
        peft.get_peft_model(base(), peft.LoraConfig(target_modules=["conv2"]))
    merged = base()
    merged.load_state_dict(model.merge_and_unload().state_dict())
    assert_close(merged(images()), expected)
    assert_close(gates(merged), learning, rtol=0, atol=0)


# Features and explanations.


def extract_features(folder: Path) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = network().eval(), images(64)
    nodes = {"layer2.0.conv2": "inside", "layer2": "layer2", "layer4": "layer4", "fc": "logits"}
    extractor = create_feature_extractor(model, nodes)
    found = extractor(x)
    maps = model.forward_intermediates(x, indices=[2, 4], intermediates_only=True)
    assert_close([found["layer2"], found["layer4"], found["logits"]], [*maps, model(x)])
    assert found["inside"].shape == (4, 32, 8, 8)
    found["layer4"].sum().backward()
    assert all(gate.grad is not None and gate.grad.count_nonzero() for gate in gates(model))


def explain_with_grad_cam(folder: Path) -> None:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = network().eval()
    with GradCAM(model, [model.layer2[-1]]) as cam:
        maps = cam(images(64), [ClassifierOutputTarget(label) for label in range(4)])
    assert maps.shape == (4, 64, 64)
    assert np.isfinite(maps).all()
    assert maps.any()


def explain_with_captum(folder: Path) -> None:
    from captum.attr import IntegratedGradients, LayerGradCam

    model, x, labels = network().eval().double(), images().double(), torch.arange(4)
    attributions, gap = IntegratedGradients(model).attribute(
        x, target=labels, n_steps=200, return_convergence_delta=True
    )
    difference = (model(x) - model(torch.zeros_like(x)))[labels, labels]
    assert_close(attributions.sum((1, 2, 3)) - gap, difference)
    assert gap.abs().max() < 0.05 * difference.abs().max()
    assert LayerGradCam(model, model.layer2[0].conv2).attribute(x, target=labels).shape == (4, 1, 4, 4)


PROGRAMS: dict[Callable[[Path], None], str] = {
    use_as_backbone: "transformers",
    fit_with_fastai: "fastai",
    adapt_the_1x1_convolutions: "peft",
    extract_features: "torchvision",
    explain_with_grad_cam: "grad-cam",
    explain_with_captum: "captum",
}


@pytest.mark.parametrize(
    "program", [pytest.param(p, marks=pytest.mark.client(name), id=p.__name__) for p, name in PROGRAMS.items()]
)
def test_a_library_works_with_the_models(program: Callable[[Path], None], tmp_path: Path) -> None:
    alone(program, tmp_path)


# Deployment of the learnable, the compact and the deployed form.

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
    from test_docs import DEPLOY, blocks

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, zero_init_last=False))
    names: dict[str, Any] = {}
    tolerances = {"onnxruntime": 1e-4, "openvino": 0.05, "torchao": 0.1}
    for code in blocks(DEPLOY, "python"):
        exec(compile(code, str(DEPLOY), "exec"), names)
        if "outputs" in names:
            expected = names["model"](names["images"]).detach()
            tolerance = tolerances.pop(code.split()[1].partition(".")[0]) * expected.abs().max().item()
            assert_close(torch.as_tensor(names.pop("outputs")), expected, rtol=0, atol=tolerance)
    assert not tolerances


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
