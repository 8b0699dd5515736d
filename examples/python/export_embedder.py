"""Trains a small network on real digits 0 to 6 and packages it for C++: examples/cpp/embedder.cpp loads it.

    python examples/python/export_embedder.py --output embedder.pt2 --images unseen

Writes the network as an AOTInductor package, with any batch size, and images of digits that it has not seen (7, 8, 9)
as PGM files to try it on. Needs a C++ compiler.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import torchmargin

DATA = Path(__file__).resolve().parents[1] / "data" / "digits.csv"
SEEN = 7  # digits 0 to 6


def read_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, 8, 8] in [-0.5, 0.5] and labels [N]."""
    rows = [[int(cell) for cell in line.split(",")] for line in DATA.read_text().splitlines()[1:]]
    table = torch.tensor(rows)
    return table[:, :64].reshape(-1, 1, 8, 8) / 16 - 0.5, table[:, 64]


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.PReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 32),
    )
    loss = torchmargin.ArcFaceLoss(32, SEEN, scale=16.0, margin=0.3)
    optimiser = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=2e-3)
    for _ in tqdm(range(epochs), unit="epoch"):
        for batch in torch.randperm(len(labels)).split(128):
            value = loss(network(images[batch]), labels[batch])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return network.eval()


def package(network: nn.Module, output: Path) -> None:
    example = torch.zeros(2, 1, 8, 8)
    exported = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},))
    size = {"channels": "1", "height": "8", "width": "8"}  # embedder.cpp brings images to it
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(output), inductor_configs={"aot_inductor.metadata": size}
    )


def write_images(folder: Path, images: torch.Tensor, labels: torch.Tensor, each: int) -> None:
    """7_0.pgm, 7_1.pgm, ...: plain PGM, readable in any editor."""
    folder.mkdir(parents=True, exist_ok=True)
    for digit in range(SEEN, 10):
        for number, image in enumerate(images[labels == digit][:each]):
            pixels = "\n".join(" ".join(str(int(p)) for p in row) for row in ((image[0] + 0.5) * 16))
            (folder / f"{digit}_{number}.pgm").write_text(f"P2\n8 8\n16\n{pixels}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("embedder.pt2"))
    parser.add_argument("--images", type=Path, help="a folder for images of unseen digits")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read_digits()
    network = train(images[labels < SEEN], labels[labels < SEEN], options.epochs)
    with torch.no_grad():
        package(network, options.output)
    if options.images:
        write_images(options.images, images, labels, each=10)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
