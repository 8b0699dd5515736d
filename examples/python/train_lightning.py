"""ArcFace in PyTorch Lightning, on real digits: trains on most images, verifies pairs of others.

    pip install lightning scikit-learn
    python examples/python/train_lightning.py
    python examples/python/train_lightning.py --precision bf16-mixed --epochs 2 --save digits.ckpt
    python examples/python/train_lightning.py --precision bf16-mixed --epochs 4 --resume digits.ckpt

The loss is a submodule: checkpoints, devices and strategies treat the class weights as any other parameter.
"""

import argparse
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchmargin
from torchmargin.evaluation import all_pairs, pair_scores, verify

DATA = Path(__file__).resolve().parents[1] / "data" / "digits.csv"
TRAINING = 1400  # images; the other 397 are verified, on pairs of digits that are known and on pairs of the rest
KNOWN = 7  # digits 0 to 6 are trained on


class Recogniser(lightning.LightningModule):
    def __init__(self, features: int = 32, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.PReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, features)),
        )
        self.loss = torchmargin.ArcFaceLoss(features, KNOWN, scale=16.0, margin=0.3)
        self.embedded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, _):
        images, labels = batch
        loss, statistics = self.loss(self(images), labels, return_statistics=True)
        self.log_dict({"accuracy": statistics.accuracy, "angle": statistics.target_angle}, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        images, labels = batch
        self.embedded.append((self(images).float(), labels))

    def on_validation_epoch_end(self):
        embeddings, labels = (torch.cat(parts) for parts in zip(*self.embedded))
        self.embedded.clear()
        for name, rows in (("eer", labels < KNOWN), ("eer_unknown", labels >= KNOWN)):  # seven digits teach little
            first, second, same = all_pairs(labels[rows])
            self.log(name, verify(pair_scores(embeddings[rows], first, second), same).eer, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)  # self.loss.weight among them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="those of a resumed run included")
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed")
    parser.add_argument("--resume", type=Path, metavar="CKPT", help="go on from this checkpoint")
    parser.add_argument("--save", type=Path, metavar="CKPT", help="write a checkpoint at the end")
    options = parser.parse_args()

    table = torch.tensor([[int(cell) for cell in line.split(",")] for line in DATA.read_text().splitlines()[1:]])
    images, labels = table[:, :64].view(-1, 1, 8, 8) / 8 - 1, table[:, 64]
    first = torch.arange(len(labels)) < TRAINING
    known, others = (TensorDataset(images[rows], labels[rows]) for rows in (first & (labels < KNOWN), ~first))
    # Lightning tells a sampler of this kind the epoch: a resumed run shuffles as one that never stopped.
    training = DataLoader(known, 64, sampler=DistributedSampler(known, num_replicas=1, rank=0))
    validation = DataLoader(others, 256)

    lightning.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(max_epochs=options.epochs, devices=1, precision=options.precision, **quiet)
    model = Recogniser()
    untrained = trainer.validate(model, validation, verbose=False)[0]["eer"]
    trainer.fit(model, training, validation, ckpt_path=options.resume)
    if options.save:
        trainer.save_checkpoint(options.save)
    eer, unknown = (trainer.callback_metrics[name] for name in ("eer", "eer_unknown"))
    print(f"equal error rate {eer:.6f}, untrained {untrained:.6f}, of pairs of unknown digits {unknown:.6f}")


if __name__ == "__main__":
    main()
