"""Train a network of your own until it takes a share of the dense network's milliseconds on this machine.

    python examples/own_network.py --costs costs.json

The first run measures each layer with every number of groups and writes the table. The machine should be idle. Later
runs read the table. You can also write it by hand, for example for a phone (docs/steering.md).
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import timm_dgconv
import timm_dgconv.measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--costs", type=Path, default=Path("costs.json"), help="the table, written if it does not exist")
parser.add_argument("--target", type=float, help="share of the dense network's time (default: half-way to the least)")
parser.add_argument("--width", type=int, default=128, help="channels of the convolutions")
parser.add_argument("--img-size", type=int, default=64)
parser.add_argument("--rounds", type=int, default=30, help="measurements of each layer")
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, args.img_size)
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=32, shuffle=True)

convs = [nn.Conv2d(channels, args.width, 3, stride=2, padding=1) for channels in (1, args.width, args.width)]
blocks = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(args.width), nn.ReLU())]
network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(args.width, 10))

model = timm_dgconv.groupable(network)  # all but the first convolution, which has one input channel
if not args.costs.exists():
    content = timm_dgconv.measure.measure(model, (1, args.img_size, args.img_size), rounds=args.rounds)
    timm_dgconv.measure.write(content, args.costs)
cost = timm_dgconv.cost_table(model, str(args.costs))
least = (cost.rest + sum(map(min, cost.tables))) / cost.dense
target = args.target or (1 + least) / 2
print(f"{', '.join(cost.names)} can learn groups; the least cost is {least:.3f} of dense, the target {target:.3f}")

timm_dgconv.steer(model, target=target, unit=str(args.costs), steps=int(0.6 * args.epochs * len(loader)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(1, args.epochs + 1):
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # moves the gates, too, and holds the target
    share = timm_dgconv.complexity(model, cost).item() / cost.dense
    print(f"epoch {epoch}: loss {loss.item():.3f}, cost {share:.3f} of dense")
torch.save(timm_dgconv.compact(model), "own_network.pt")  # plain group convolutions
