"""Fine-tune a network to a target of multiply-adds with Lightning, as finetune.py does in a plain loop.

pip install lightning
python examples/finetune_lightning.py --model g_resnet18 --pretrained --target 0.5
"""

import argparse
from typing import Any

import lightning
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

import timm_dgconv


class Classifier(lightning.LightningModule):
    """A classifier. Only the arguments of its network say that it learns groups."""

    def __init__(self, **network: Any) -> None:
        super().__init__()
        self.model = timm.create_model(in_chans=1, num_classes=10, **network)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss."""
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer. Its steps move the gates, too, and hold the target."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="g_resnet18")
parser.add_argument("--pretrained", action="store_true", help="start with timm's weights")
parser.add_argument("--target", type=float, default=0.5, help="share of the dense network's multiply-adds")
parser.add_argument("--img-size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

lightning.seed_everything(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, args.img_size)
training, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.75, 0.25])
loader = DataLoader(training, batch_size=32, shuffle=True)
steps = int(0.6 * args.epochs * len(loader))  # the gates then stand still, and the weights settle
target = dict(complexity_target=args.target, complexity_unit="macs", img_size=args.img_size, gate_steps=steps)
classifier = Classifier(model_name=args.model, pretrained=args.pretrained, **target)
lightning.Trainer(max_epochs=args.epochs).fit(classifier, loader, DataLoader(test, batch_size=64))
print(timm_dgconv.group_report(classifier.model, (1, args.img_size, args.img_size)))
