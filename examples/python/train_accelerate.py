"""ArcFace with Hugging Face Accelerate, on real digits: trains on most images, is tried on the others.

    pip install accelerate
    python examples/python/train_accelerate.py
    torchrun --standalone --nproc-per-node 2 examples/python/train_accelerate.py    # GPUs, or else processes on the CPU
    accelerate launch --multi_gpu --num_processes 2 examples/python/train_accelerate.py

`accelerate launch --cpu --num_processes 2` is one process alone. Each process holds all class weights; where they no
longer fit, see train_class_parallel.py.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchmargin

DATA = Path(__file__).resolve().parents[1] / "data" / "digits.csv"
TRAINING = 1400  # images; the other 397 are written by other people


class Recogniser(nn.Module):
    """Network and loss in one module: what is prepared as one is averaged over the processes as one."""

    def __init__(self, features: int = 64):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 256), nn.PReLU(), nn.Linear(256, features))
        self.loss = torchmargin.ArcFaceLoss(features, 10, scale=16.0, margin=0.3)

    def forward(self, images, labels):
        return self.loss(self.network(images), labels, return_statistics=True)

    def classify(self, images):
        return self.loss.logits(self.network(images)).argmax(1)


def read_digits() -> tuple[TensorDataset, TensorDataset]:
    table = torch.tensor([[int(cell) for cell in line.split(",")] for line in DATA.read_text().splitlines()[1:]])
    images, labels = table[:, :64] / 8 - 1, table[:, 64]
    return TensorDataset(images[:TRAINING], labels[:TRAINING]), TensorDataset(images[TRAINING:], labels[TRAINING:])


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Over the images of all processes, each counted once."""
    recogniser = accelerator.unwrap_model(model).eval()
    right = []
    for images, labels in loader:
        right.append(accelerator.gather_for_metrics(recogniser.classify(images) == labels))
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of each step")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    options = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # unless told so, processes without a GPU do not meet
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
    )
    set_seed(0)
    model = Recogniser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    training, others = read_digits()
    loader, tests = DataLoader(training, options.batch, shuffle=True), DataLoader(others, 128)
    model, optimizer, loader, tests = accelerator.prepare(model, optimizer, loader, tests)
    untrained = accuracy(accelerator, model, tests)
    for epoch in range(options.epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss, statistics = model(images, labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        loss, angle = accelerator.reduce(torch.stack([loss.detach(), statistics.target_angle]), "mean").tolist()
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.3f}, angle to the class {angle:.2f}")
    share = accuracy(accelerator, model, tests)
    accelerator.print(f"processes {accelerator.num_processes}, accuracy {share:.3f}, untrained {untrained:.3f}")
    model, optimizer, loader, tests = accelerator.free_memory(model, optimizer, loader, tests)  # they hold the group
    accelerator.end_training()


if __name__ == "__main__":
    main()
