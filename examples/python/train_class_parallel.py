"""Classes over ranks: real digits, or a folder with a folder of images for each identity.

    torchrun --nproc-per-node 2 examples/python/train_class_parallel.py
    torchrun --nproc-per-node 8 examples/python/train_class_parallel.py --images faces --sample 0.1

Each rank holds a part of the class weights and its own part of the images. The network is wrapped in
DistributedDataParallel, the head is not: its weights differ from rank to rank. Run it again with another number of
ranks and the same --checkpoint, and training goes on from there.
"""

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchmargin
from torchmargin.distributed import ClassParallel, ClassSampler, attach_row_optimizer, step_in_backward

FEATURES = 64


def read_images(folder: Path | None) -> tuple[torch.utils.data.Dataset, int, int]:
    """A data set of (image [c, h, w], label), the number of identities, and h w c."""
    if folder is None:
        from sklearn.datasets import load_digits

        images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
        return TensorDataset(images.float().view(-1, 1, 8, 8) / 16 - 0.5, labels.long()), 10, 64
    from torchvision import datasets, transforms

    steps = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    found = datasets.ImageFolder(folder, transforms.Compose(steps))
    return found, len(found.classes), 3 * 32 * 32


class Training:
    """Network, head and their optimizers, as one thing to save and load."""

    def __init__(self, mesh, pixels: int, classes: int, sample: float | None, blocks: int):
        device = mesh.device_type
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.PReLU(), nn.Linear(256, FEATURES))
        self.network = DistributedDataParallel(network.to(device))
        # On the meta device: no rank ever holds the weights of all classes.
        loss = torchmargin.ArcFaceLoss(FEATURES, classes, scale=16.0, margin=0.3, device="meta")
        sampler = None if sample is None else ClassSampler(sample)
        self.head = ClassParallel(loss, mesh, blocks=blocks, sampler=sampler)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3)
        self.head_optimizer = torch.optim.SGD(self.head.parameters(), lr=0.3, momentum=0.9)
        self.steps_in_backward = sample is None and blocks > 1
        if sample is not None:
            attach_row_optimizer(self.head, self.head_optimizer)
        elif self.steps_in_backward:
            step_in_backward(self.head, self.head_optimizer)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.head.prepare(labels)  # they travel while the network works
        loss = self.head(self.network(images), labels)
        self.optimizer.zero_grad()
        if not self.steps_in_backward:
            self.head_optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if not self.steps_in_backward:
            self.head_optimizer.step()
        return loss.detach()

    def state(self) -> dict:
        """What torch.distributed.checkpoint saves, and loads at any number of ranks."""
        state = {"network": self.network.module.state_dict(), "head": self.head.state_dict()}
        state["optimizer"] = get_optimizer_state_dict(self.network.module, self.optimizer)
        if self.head.sampler is None:  # else the rows' state is in the head's
            state["head_optimizer"] = get_optimizer_state_dict(self.head, self.head_optimizer)
        return state

    def load(self, checkpoint: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=str(checkpoint))
        self.network.module.load_state_dict(state["network"])
        self.head.load_state_dict(state["head"])
        set_optimizer_state_dict(self.network.module, self.optimizer, state["optimizer"])
        if "head_optimizer" in state:
            set_optimizer_state_dict(self.head, self.head_optimizer, state["head_optimizer"])


@torch.no_grad()
def accuracy(training: Training, loader: DataLoader, device: str) -> float:
    """Over the images of all ranks."""
    counts = torch.zeros(2, device=device)
    for images, labels in loader:
        _, classes = training.head.top1(training.network.module(images.to(device)))
        counts += torch.tensor([(classes == labels.to(device)).sum(), len(labels)], device=device)
    dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


def train(options: argparse.Namespace, device: str) -> None:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    images, classes, pixels = read_images(options.images)
    training = Training(mesh, pixels, classes, options.sample, options.blocks)
    if options.checkpoint and (options.checkpoint / ".metadata").exists():
        training.load(options.checkpoint)

    sampler = DistributedSampler(images)
    loader = DataLoader(images, options.batch, sampler=sampler)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        training.head.train()
        for batch, labels in loader:
            loss = training.step(batch.to(device), labels.to(device))
        training.head.eval()
        share = accuracy(training, loader, device)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {share:.3f}", flush=True)
    if options.checkpoint:
        dcp.save(training.state(), checkpoint_id=str(options.checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder with a folder for each identity; default: digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="of each rank")
    parser.add_argument("--sample", type=float, help="the share of classes that take part in a step")
    parser.add_argument("--blocks", type=int, default=1, help="more than one: the optimizer steps in the backward pass")
    parser.add_argument("--checkpoint", type=Path, help="a folder: loaded where it is there, written at the end")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    train(options, "cuda" if gpu else "cpu")
    gc.collect()  # what holds the process group has to go before it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
