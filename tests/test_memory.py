"""Networks and what they have read, planned and steered are freed."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import set_gates, trained
from timm.utils import reparameterize_model
from torch import nn

from timm_dgconv import compact, freeze_groups
from timm_dgconv.ops.plan import make_plan


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize("kwargs", [{}, {"complexity_target": 0.1}, {"sort": False}], ids=str)
def test_steps_keep_no_objects_and_networks_are_freed(kwargs: dict[str, Any]) -> None:
    """The groups change in each step."""
    model: Any = trained(num_classes=5, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    counts = []
    for step in range(40):
        set_gates(model, lambda gate: gate.copysign(torch.randn_like(gate)))
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        if step % 20 == 19:
            make_plan.cache_clear()  # it keeps at most 1024
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 20
    forms = [form(model) for form in (compact, reparameterize_model, copy.deepcopy)]
    freeze_groups(forms[-1])
    references = [weakref.ref(net) for net in (model, *forms)]
    del model, optimizer, forms
    gc.collect()
    assert not any(isinstance(reference(), nn.Module) for reference in references)
