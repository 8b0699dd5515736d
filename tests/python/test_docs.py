"""The Python blocks of README.md and docs/*.md run as they stand, with small stand-ins for what the reader has.

A line `name = ...` stands for the reader's own: it is left out, and STAND_INS has the name.
"""

import ast
import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import torchmargin

from rounding import LinearRounding, assert_within

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = {
    "fully_shard(part)": "wants ranks: test_distributed.py does the same with two",
    "10_000_000": "20 GB of weights",
}


def _blocks():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for match in re.finditer(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            line = path.read_text(encoding="utf-8").count("\n", 0, match.start()) + 2
            name = f"{path.relative_to(ROOT)}:{line}"
            reasons = [reason for text, reason in NOT_RUN.items() if text in match[1]]
            marks = [pytest.mark.skip(reason=reason) for reason in reasons]
            yield pytest.param(path, line, match[1], id=name, marks=marks)


def _images(classes, each=2):
    """[N, 512] and labels: a batch of "images" that the network below takes."""
    return torch.randn(classes * each, 512), torch.arange(classes).repeat(each)


def _readme(folder):
    return {"network": nn.Linear(512, 512), "loader": [_images(3)]}


def _losses(folder):
    embeddings, labels = _images(7)
    return {"num_classes": 7, "embeddings": embeddings, "labels": labels}


def _evaluation(folder):
    image = pytest.importorskip("PIL.Image", reason="ImageFolder needs Pillow")
    pytest.importorskip("torchvision", reason="a block uses its ImageFolder")
    (folder / "lfw").mkdir()
    people = [f"Abel_{k}\t1\t2\nAbel_{k}\t1\tDean_{k}\t3" for k in range(5)]
    (folder / "lfw/pairs.txt").write_text("5\t1\n" + "\n".join(people))
    for k in range(6):
        (folder / f"faces/{k // 3}").mkdir(parents=True, exist_ok=True)
        image.new("L", (4, 4), k).save(folder / f"faces/{k // 3}/{k}.png")
    embeddings, labels = _images(2, 3)
    return {
        "folder": folder,
        "load": lambda path: torch.randn(1, 512),
        "network": nn.Linear(512, 512).requires_grad_(False),
        "embeddings": embeddings,
        "probes": embeddings,
        "probe_labels": labels.index_fill(0, torch.tensor([0]), 77),  # one stranger
        "gallery": embeddings + 0.1,
        "gallery_labels": labels,
    }


def _migrating(folder):
    from pytorch_metric_learning import losses

    embeddings, labels = _images(20)
    labels[3] = -1
    (folder / "work_dir").mkdir()
    for rank, classes in enumerate((13, 7)):
        shard = {"state_dict_softmax_fc": {"weight": torch.randn(classes, 512)}}
        torch.save(shard, folder / f"work_dir/checkpoint_gpu_{rank}.pt")
    torch.save({"projection.weight": torch.randn(60, 256)}, folder / "model_149.pt")
    return {
        "their_loss": losses.ArcFaceLoss(10575, 512),
        "world_size": 2,
        "num_classes": 20,
        "embeddings": embeddings.requires_grad_(),
        "labels": labels,
        "loss": torchmargin.compat.insightface_arcface(512, 20),
    }


def _distributed(folder):
    """One rank, a group of its own: tests/python/distributed has more."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for rank in range(4):
        shard = {"state_dict_softmax_fc": {"weight": torch.randn(250, 64)}}
        torch.save(shard, folder / f"checkpoint_gpu_{rank}.pt")
    head = torchmargin.distributed.ClassParallel(torchmargin.ArcFaceLoss(64, 1000, device="meta"), mesh)
    return {
        "dist": dist,
        "mesh": mesh,
        "network": nn.Linear(512, 64),
        "head": head,
        "head_optimizer": torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9),
        "ClassParallel": torchmargin.distributed.ClassParallel,
    }


STAND_INS = {
    "docs/distributed.md": _distributed,
    "README.md": _readme,
    "docs/losses.md": _losses,
    "docs/evaluation.md": _evaluation,
    "docs/migrating.md": _migrating,
}


def _is_readers_own(statement):
    return (
        isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and statement.value.value is Ellipsis
    )


def _run(path, line, code, folder):
    names = {"torch": torch, "torchmargin": torchmargin}
    names.update(STAND_INS.get(str(path.relative_to(ROOT)), lambda folder: {})(folder))
    tree = ast.parse(code, filename=str(path))
    tree.body = [statement for statement in tree.body if not _is_readers_own(statement)]
    exec(compile(ast.increment_lineno(tree, line - 1), str(path), "exec"), names)
    return names


@pytest.mark.parametrize(("path", "line", "code"), list(_blocks()))
def test_a_block_runs_as_it_stands(path, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        _run(path, line, code, tmp_path)
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # what holds a process group has to go before it
            torch.distributed.destroy_process_group()


def test_the_loss_of_your_own_leaves_ignored_rows_out(tmp_path):
    """docs/losses.md: the margins [C] are looked up by label, and the label of an ignored row is -100."""
    block = next(block for block in _blocks() if "CurriculumArcFace" in block.values[2])
    recipe = _run(*block.values, tmp_path)["CurriculumArcFace"]
    loss = recipe(512, torch.tensor([10.0, 40.0, 20.0])).double()
    embeddings, labels = _images(3)
    embeddings = embeddings.double()
    labels[[1, 4]] = -100
    known = labels >= 0
    expected = [loss(embeddings[row][None], labels[row][None]) for row in known.nonzero()[:, 0]]
    rounding = LinearRounding(embeddings[known], loss.weight, labels[known], scale=64.0, m2=0.5)  # its largest margin
    assert_within(loss(embeddings, labels), torch.stack(expected).mean(), rounding.loss(0.0, known.sum()))
    plain = torchmargin.MarginLoss(512, 3, scale=64.0, extension="monotonic").double()
    plain.load_state_dict(loss.state_dict(), strict=False)
    assert loss(embeddings, labels) > plain(embeddings, labels)  # there is a margin
