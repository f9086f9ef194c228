"""Training: the complexity of a model, and steering it in an unchanged training loop."""

from timm_dgconv.optim.complexity import complexity as complexity
from timm_dgconv.optim.complexity import dgconv_layers as dgconv_layers
from timm_dgconv.optim.complexity import freeze_groups as freeze_groups
from timm_dgconv.optim.steering import steer as steer
