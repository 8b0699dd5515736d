"""Small sets of drawn faces for tests of training and of what follows it."""

import csv

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
from recipes.face.align import align  # noqa: E402
from recipes.face.embedders import Embedder, Network  # noqa: E402
from recipes.face.networks import make_network  # noqa: E402
from recipes.face.pack import pack_folder, pack_pairs  # noqa: E402
from recipes.face.rendering import render  # noqa: E402

SIZE = 32
SMALL = ["--config", "narrow", "--workers", "0", "--device", "cpu"]
SMALL += [part for each in ("width=2", f"size={SIZE}", "features=16", "log_every=1") for part in ("--set", each)]


def faces(folder, people=6, views=8):
    """PERSON/VIEW.jpg under folder/faces, aligned; returns that folder."""
    landmarks = render(folder / "photos", people, views)
    align(folder / "photos", folder / "faces", size=SIZE, landmarks=landmarks, say=lambda _: None)
    return folder / "faces"


def people_of(folder):
    """The folders of the people of such a folder."""
    return sorted(each for each in folder.iterdir() if each.is_dir())


def records(folder, **options):
    found = faces(folder, **options)
    pack_folder(found, folder / "train.rec")
    return folder / "train.rec"


def pairs(folder, of, count=60):
    """A verification set of the faces in `of`, half of one person, at folder/pairs.bin."""
    people = [sorted(each.glob("*.jpg")) for each in people_of(of)]
    generator = torch.Generator().manual_seed(0)
    pick = lambda most: int(torch.randint(most, (1,), generator=generator))
    rows = []
    for place in range(count):
        first = pick(len(people))
        second = first if place % 2 == 0 else (first + 1 + pick(len(people) - 1)) % len(people)
        a = people[first][pick(len(people[first]))]
        b = people[second][pick(len(people[second]))]
        rows.append([a.relative_to(folder), b.relative_to(folder), int(first == second)])
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    pack_pairs(folder / "pairs.csv", folder / "pairs.bin")
    return folder / "pairs.bin"


def embedder(path, seed=0, **options):
    """An untrained one at `path`, whose batch norms know what images look like: its embeddings point everywhere."""
    torch.manual_seed(seed)
    network = Network("iresnet18", 16, SIZE, 2)
    model = make_network(network.name, network.features, network.size, network.width)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        spots = torch.rand(64, 3, 4, 4) * 2 - 1
        model.train()(torch.nn.functional.interpolate(spots, size=(SIZE, SIZE), mode="bilinear"))
    made = Embedder(network, model.eval().requires_grad_(False), **options)
    made.save(path)
    return made
