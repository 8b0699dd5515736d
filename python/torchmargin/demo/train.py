"""A small network and the loop that trains it with any loss module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchmargin.demo.data import Digits
from torchmargin.losses import MarginLoss

__all__ = ["Embedder", "accuracy", "embed", "train"]

BATCH = 64


class Embedder(nn.Sequential):
    """Three stride-2 convolutions and one linear layer: images [B, 1, 28, 28] to [B, features]."""

    def __init__(self, features: int) -> None:
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((1, 32), (32, 64), (64, 64)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
                nn.BatchNorm2d(channels_out),
                nn.PReLU(channels_out),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, features))


def train(network: nn.Module, loss: MarginLoss, digits: Digits, epochs: int, seed: int, title: str) -> float:
    """Trains both; returns the mean loss of the last epoch. One seed gives one order of batches."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [*network.parameters(), *loss.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = -(-len(digits.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=epochs * steps)
    network.train()
    mean = float("nan")
    with tqdm(total=epochs * steps, desc=title, unit="batch") as bar:
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(digits.labels), generator=generator).split(BATCH):
                value = loss(network(digits.images[batch]), digits.labels[batch])
                optimiser.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 5.0)
                optimiser.step()
                schedule.step()
                total += value.item() * len(batch)
                bar.update()
            mean = total / len(digits.labels)
            bar.set_postfix(loss=f"{mean:.3f}")
    return mean


@torch.no_grad()
def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [N, features] of images [N, 1, 28, 28]."""
    network.eval()
    return torch.cat([network(part) for part in images.split(500)])


def accuracy(loss: MarginLoss, embeddings: Tensor, labels: Tensor) -> float:
    """The share of rows whose class has the largest logit."""
    with torch.no_grad():
        return (loss.logits(embeddings).argmax(1) == labels).float().mean().item()
