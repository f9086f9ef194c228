"""G-DenseNet, whose convolutions are in timm's own blocks."""

import timm
import torch
from conftest import trained
from torch.testing import assert_close

from timm_dgconv import compact, layer_groups

SMALL = dict(num_classes=3, block_config=(2, 2, 2, 2))


def test_a_compact_g_densenet_is_built_again_from_its_groups() -> None:
    model, images = trained("g_densenet121", **SMALL).eval(), torch.randn(1, 3, 32, 32)
    small, groups = compact(model), layer_groups(model)
    assert len(groups) == 8
    again = timm.create_model("g_densenet121", groups=groups, **SMALL).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(images), small(images))


def test_a_g_densenet_loads_the_weights_of_its_base_model() -> None:
    base = timm.create_model("densenet121", **SMALL).eval()
    model = timm.create_model("g_densenet121", **SMALL).eval()
    model.load_state_dict(base.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert_close(model(images), base(images))
    assert set(layer_groups(model)) == {1}
