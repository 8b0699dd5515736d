"""A small network and the loop that trains it with any loss module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchmargin.demo.data import Images
from torchmargin.losses import MarginLoss

__all__ = ["SmallNetwork", "Trainer", "accuracy", "embed", "make_network"]


class SmallNetwork(nn.Sequential):
    """Three stride-2 convolutions and one linear layer: images [B, channels, H, W] to [B, features]."""

    def __init__(self, channels: int, features: int) -> None:
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((channels, 32), (32, 64), (64, 64)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.PReLU(channels_out),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 4 * 4, features))


def make_network(name: str, channels: int, features: int) -> nn.Module:
    """ "small", or any of torchvision's classification models with `features` outputs, untrained."""
    network: nn.Module
    if name == "small":
        network = SmallNetwork(channels, features)
    else:
        from torchvision import models

        if name not in models.list_models(module=models):
            raise SystemExit(f"there is no network {name!r}: 'small' or a classification model of torchvision")
        network = models.get_model(name, weights=None, num_classes=features)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads leave it out
    return network


class Trainer(NamedTuple):
    """How every network of one run is trained: the same start and the same batches for every loss."""

    network: str
    batch: int
    seed: int

    def steps(self, images: Images, epochs: int) -> int:
        return epochs * -(-len(images) // self.batch)

    def train(
        self, make: Callable[[int, int, int], MarginLoss], features: int, images: Images, epochs: int, title: str
    ) -> tuple[nn.Module, MarginLoss]:
        """A fresh network and loss, `make(features, classes, steps)`, trained together."""
        steps = self.steps(images, epochs)
        torch.manual_seed(self.seed)
        network = make_network(self.network, images.channels, features)
        torch.manual_seed(self.seed + 1)  # not the network's own random numbers again
        loss = make(features, len(images.names), steps)
        if features == 2:
            _spread(loss.weight, loss.sub_centers)
        generator = torch.Generator().manual_seed(self.seed)
        parameters = [*network.parameters(), *loss.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
        network.train()
        loss.train()
        with tqdm(total=steps, desc=title, unit="batch", leave=False, mininterval=0.5) as bar:
            for _ in range(epochs):
                order = torch.randperm(len(images), generator=generator)
                for batch, labels in images.batches(order, self.batch):
                    value = loss(network(batch.to(memory_format=torch.channels_last)), labels)
                    optimiser.zero_grad()
                    value.backward()
                    nn.utils.clip_grad_norm_(parameters, 5.0)
                    optimiser.step()
                    schedule.step()
                    bar.update()
                bar.set_postfix(loss=f"{value.item():.3f}")
        return network, loss


@torch.no_grad()
def _spread(weight: Tensor, centers: int) -> None:
    """Class weights evenly around the circle: in the plane a class cannot pass another to find its place. A class's
    centers begin side by side."""
    turn = torch.arange(len(weight)) * (2 * math.pi / len(weight))
    weight.copy_(torch.stack([turn.cos(), turn.sin()], dim=1))


@torch.no_grad()
def embed(network: nn.Module, images: Images) -> Tensor:
    """Embeddings [N, features] of all images."""
    network.eval()
    return torch.cat([network(batch) for batch, _ in images.batches(torch.arange(len(images)), 500)])


@torch.no_grad()
def accuracy(loss: MarginLoss, embeddings: Tensor, labels: Tensor) -> float:
    """The share of rows whose class has the largest logit."""
    return (loss.logits(embeddings).argmax(1) == labels).float().mean().item()
