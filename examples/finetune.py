"""Fine-tune a network to a target of multiply-adds, in a plain PyTorch loop.

    python examples/finetune.py --model g_resnet18 --pretrained --target 0.5

The images are scikit-learn's digits, so that nothing but the weights is downloaded.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split

import timm_dgconv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="g_resnet18")
parser.add_argument("--pretrained", action="store_true", help="start with timm's weights")
parser.add_argument("--target", type=float, default=0.5, help="share of the dense network's multiply-adds")
parser.add_argument("--img-size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, args.img_size)
training, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.75, 0.25])
loader = DataLoader(training, batch_size=32, shuffle=True)

model = timm.create_model(
    args.model,
    pretrained=args.pretrained,
    in_chans=1,
    num_classes=10,
    complexity_target=args.target,
    complexity_unit="macs",
    img_size=args.img_size,
    gate_steps=int(0.6 * args.epochs * len(loader)),  # the gates then stand still, and the weights settle
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(1, args.epochs + 1):
    model.train()
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # moves the gates, too, and holds the target
    model.eval()
    with torch.inference_mode():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(test, batch_size=64))
    report = timm_dgconv.group_report(model, (1, args.img_size, args.img_size))
    share = report.learned.macs / report.dense.macs
    print(f"epoch {epoch}: accuracy {right / len(test):.3f}, multiply-adds {share:.3f} of dense")

small = timm_dgconv.compact(model)  # with plain group convolutions
torch.save(small.state_dict(), "finetuned.pt")
kwargs = f"in_chans=1, num_classes=10, groups={timm_dgconv.layer_groups(small)}"
print(f"load it with timm.create_model({args.model!r}, {kwargs}, checkpoint_path='finetuned.pt')")
