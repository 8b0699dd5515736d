"""ArcFace in place of the classifier of a timm model, on real digits: trains on most images, is tried on the others.

    pip install timm
    python examples/python/train_timm.py
    python examples/python/train_timm.py --model resnet18 --size 64

timm makes the network, the optimizer, the schedule and the moving average of all weights, those of the classes too.
Nothing is downloaded.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import torchmargin

DATA = Path(__file__).resolve().parents[1] / "data" / "digits.csv"
TRAINING = 1400  # images; the other 397 are written by other people


class Recogniser(nn.Module):
    """Network and loss in one module, so that the optimizer and the moving average see the weights of both."""

    def __init__(self, name: str):
        super().__init__()
        self.network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=1)  # 0: no classifier
        self.loss = torchmargin.ArcFaceLoss(self.network.head_hidden_size, 10, scale=16.0, margin=0.3)

    def forward(self, images, labels):
        return self.loss(self.network(images), labels)

    @torch.no_grad()
    def accuracy(self, images, labels) -> float:
        self.eval()
        return (self.loss.logits(self.network(images)).argmax(1) == labels).float().mean().item()


def read_digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor([[int(cell) for cell in line.split(",")] for line in DATA.read_text().splitlines()[1:]])
    images = table[:, :64].view(-1, 1, 8, 8) / 8 - 1
    return nn.functional.interpolate(images, size=size, mode="bilinear"), table[:, 64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="of timm.list_models()")
    parser.add_argument("--size", type=int, default=32, help="what the digits are resized to")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = read_digits(options.size)
    others = images[TRAINING:], labels[TRAINING:]
    model = Recogniser(options.model)
    untrained = model.accuracy(*others)

    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    updates = -(-TRAINING // options.batch)  # of an epoch
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.epochs, step_on_epochs=False, updates_per_epoch=updates
    )
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)
    step = 0
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(TRAINING).split(options.batch):
            loss = model(images[batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            average.update(model, step=step)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {average.module.accuracy(*others):.3f}")
    print(f"accuracy {average.module.accuracy(*others):.3f}, untrained {untrained:.3f}")


if __name__ == "__main__":
    main()
