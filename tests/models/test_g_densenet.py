"""G-DenseNet, whose convolutions `groupable` converts."""

import timm
import torch
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, complexity, layer_groups
from timm_dgconv.models.compact import group_layers

SMALL = dict(num_classes=3, block_config=(2, 2, 2, 2))


def test_learns_towards_a_target_and_compacts() -> None:
    torch.manual_seed(0)
    model = timm.create_model("g_densenet121", complexity_target=0.25, init_groups=1, **SMALL)
    convs = [module for module in model.modules() if isinstance(module, DGConv2d)]
    assert len(convs) == 8
    dense = sum(conv.in_channels * conv.out_channels for conv in convs)
    assert complexity(model).item() == dense
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert complexity(model).item() <= 0.25 * dense

    model.eval()
    small = compact(model)
    assert_close(small(images), model(images), rtol=1e-4, atol=1e-5)
    assert any(layer.num_orders() for layer in group_layers(small).values())
    again = timm.create_model("g_densenet121", groups=layer_groups(model), **SMALL).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(images), small(images))


def test_loads_the_weights_of_its_source() -> None:
    source = timm.create_model("densenet121", **SMALL).eval()
    model = timm.create_model("g_densenet121", **SMALL).eval()
    model.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert_close(model(images), source(images))
    assert set(layer_groups(model)) == {1}
