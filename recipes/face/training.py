"""``train``: a network and the classes of its loss, on one rank or, under torchrun, on many.

The network is under DistributedDataParallel; the classes are spread over the ranks by ClassParallel (with one rank they
are all its own). All randomness of a step is of the seed, the step and the rank, so that a run that was stopped goes on
bit for bit. ``last.pt`` has the state whole, whatever the number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from recipes.face import protocols
from recipes.face.config import CONFIGS, FREE, LOSSES, Config, ConfigError, changed, make_loss
from recipes.face.data import EpochPlaces, Images, TrainingSet, open_images
from recipes.face.embedders import Embedder, Network, checked_device, load_plain, load_state, save_whole
from recipes.face.errors import RecipeError
from recipes.face.networks import make_network
from recipes.face.verification_sets import read_verification_set
from torchmargin.distributed import ClassParallel, ClassSampler, attach_row_optimizer

_FORMAT = "torchmargin.recipes.face.training/1"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SENT = ("network", "optimizer", "head", "head_optimizer", "mean")  # of a state: what has tensors
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class TrainingError(RecipeError):
    """Why training did not begin or go on."""


class Stopped(KeyboardInterrupt):
    """Asked to end: last.pt is written."""


# ---- ranks ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ranks(device: str | None = None) -> Iterator[DeviceMesh]:
    """The ranks that torchrun started, or this process alone."""
    asked = None if device is None else checked_device(device)
    kind = asked.type if asked else ("cuda" if torch.cuda.is_available() else "cpu")
    launched = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    place = int(os.environ.get("LOCAL_RANK", "0")) if launched else 0
    if kind == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    own = not dist.is_initialized()
    if own:
        if launched:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        if kind == "cuda" and not launched and asked is not None:
            torch.cuda.set_device(asked.index or 0)  # a mesh of one rank takes the first
        yield mesh
    finally:
        if own:
            dist.destroy_process_group()


# ---- steps ---------------------------------------------------------------------------------------------------------


def rate_at(config: Config, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step in [0, steps): rising over `warmup` of them, then to 0."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr * (0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done)


class Trainer:
    """Everything that a step changes, with its state.

    Args:
        images: the training set's.
        init: a file with the network's weights to begin from.
    """

    def __init__(self, config: Config, images: Images, mesh: DeviceMesh, init: Path | None = None) -> None:
        config.check()
        self.config, self.mesh = config, mesh
        self.rank, self.world = mesh.get_local_rank(), mesh.size()
        on_gpu = mesh.device_type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.classes, self.step = images.classes, 0
        self.places = EpochPlaces(
            len(images), config.batch * config.accumulate * self.world, self.rank, self.world, config.seed
        )
        self.steps = self.places.steps * config.epochs
        self.warmup = round(config.warmup * self.places.steps)

        torch.manual_seed(config.seed)
        network = make_network(
            config.net, config.features, config.size, config.width, config.dropout, config.grad_checkpointing
        )
        if init is not None:
            load_state(network, load_plain(init), init)
        network = network.to(self.device)
        if config.sync_bn and self.world > 1:
            if not on_gpu:
                raise TrainingError("sync_bn: torch has batch norms over ranks on GPUs alone; take --no-sync-bn")
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.order = torch.channels_last if on_gpu and config.channels_last else torch.contiguous_format
        network = network.to(memory_format=self.order)  # type: ignore[call-overload]
        self.network = network
        self.mean = None
        if config.ema:
            self.mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        compiled = torch.compile(network) if config.compile else network
        self.forward: nn.Module = cast(nn.Module, compiled)
        if self.world > 1:
            self.forward = DistributedDataParallel(cast(nn.Module, compiled))

        loss = make_loss(config, self.classes, device="meta")
        sampler = ClassSampler(config.sample_rate) if config.sample_rate < 1 else None
        try:
            self.head = ClassParallel(loss, mesh, sampler=sampler)
        except ValueError as error:
            raise ConfigError(f"{config.loss}: {error}") from None
        self._spread_centers()
        learned = [each for each in network.parameters() if each.requires_grad]
        sgd: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.decay}
        self.optimizer = torch.optim.SGD(learned, **sgd)
        self.head_optimizer = torch.optim.SGD(self.head.parameters(), **sgd)
        if sampler is not None:
            attach_row_optimizer(self.head, self.head_optimizer)
        self.scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            self.device.type, enabled=config.amp == "fp16", growth_interval=config.growth_interval
        )

    @torch.no_grad()
    def _spread_centers(self) -> None:
        """The class weights' deviation: a normalised weight moves by its gradient over its length."""
        for block in self.head.weight:
            local = cast(Any, block)._local_tensor
            centers = self.classes * (1 if local.dim() == 2 else local.shape[1])
            local.mul_(self.config.center_deviation / math.sqrt(2 / (centers + local.shape[-1])))

    def run_step(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One step on `accumulate` batches of pixels and labels; returns loss, angle and accuracy, [3]."""
        config = self.config
        torch.manual_seed(_mixed(config.seed, self.step, self.rank))
        rate = rate_at(config, self.step, self.steps, self.warmup)
        optimizers = [self.optimizer, self.head_optimizer]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.amp)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.head.train()
        self.network.train()
        for place, (pixels, labels) in enumerate(batches):
            pixels, labels = (each.to(self.device, non_blocking=True) for each in (pixels, labels))
            self.head.prepare(labels)
            x = pixels.to(memory_format=self.order).float().sub_(127.5).div_(127.5)
            more = place + 1 < len(batches) and isinstance(self.forward, DistributedDataParallel)
            with self.forward.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    embeddings = self.forward(x)
                    loss, seen = self.head(embeddings.float(), labels, return_statistics=True)
                self.scaler.scale(loss / len(batches)).backward()
            sums += torch.stack([loss.detach(), seen.target_angle, seen.accuracy]).double() / len(batches)
        if config.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], config.clip)
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.mean is not None:
            self.mean.update_parameters(self.network)
        self.step += 1
        return sums

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All of it, on rank 0; every rank calls it."""
        with _quiet():
            found = {
                "format": _FORMAT,
                "step": self.step,
                "config": dataclasses.asdict(self.config),
                "classes": self.classes,
                "images": self.places.count,
                "ranks": self.world,
                "network": get_model_state_dict(self.network, options=_WHOLE),
                "optimizer": get_optimizer_state_dict(self.network, self.optimizer, options=_WHOLE),
                "head": get_model_state_dict(self.head, options=_WHOLE),
                "scaler": self.scaler.state_dict(),
            }
            if self.head.sampler is None:
                found["head_optimizer"] = get_optimizer_state_dict(self.head, self.head_optimizer, options=_WHOLE)
        if self.mean is not None:
            found["mean"] = self.mean.state_dict()
        return found

    def load(self, state: dict[str, Any]) -> None:
        """What rank 0 read; the others give empty dicts for what has tensors."""
        self.step = int(state["step"])
        with _quiet():
            set_model_state_dict(self.network, state["network"], options=_SPREAD)
            set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"], options=_SPREAD)
            set_model_state_dict(self.head, state["head"], options=_SPREAD)
            if self.head.sampler is None:
                set_optimizer_state_dict(self.head, self.head_optimizer, state["head_optimizer"], options=_SPREAD)
            if self.mean is not None:
                set_model_state_dict(self.mean, state["mean"], options=_SPREAD)
        self.scaler.load_state_dict(state["scaler"])

    def embedder(self) -> Embedder:
        """Of the weights as they are, or of their mean."""
        config = self.config
        network = Network(config.net, config.features, config.size, config.width)
        source = self.network if self.mean is None else self.mean.module
        model = network.make()
        model.load_state_dict(source.state_dict())
        model.eval().requires_grad_(False).to(self.device)
        trained = {"step": self.step, "classes": self.classes, **dataclasses.asdict(config)}
        return Embedder(network, model, trained=trained)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 0x9E3779B97F4A7C15 + number + 1) & (2**63 - 1)
    return seed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's own state_dict functions warn of torch's own functions."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


# ---- a run ---------------------------------------------------------------------------------------------------------


class Log:
    """log.csv, val.csv and TensorBoard's events, on rank 0. Lines of steps that are taken again are dropped."""

    columns = ["step", "epoch", "lr", "loss", "angle_degrees", "accuracy", "images_per_second"]

    def __init__(self, out: Path | None, step: int) -> None:
        self.out, self.writer = out, None
        if out is None:
            return
        for name in ("log.csv", "val.csv"):
            self._cut(out / name, step)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        if not path.exists():
            return
        if step == 0:
            path.unlink()
            return
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(kept)

    def add(self, name: str, columns: list[str], row: list[Any]) -> None:
        """A line; its first column is the step."""
        if self.out is None:
            return
        path = self.out / name
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if fresh:
                table.writerow(columns)
            table.writerow([f"{each:.6g}" if isinstance(each, float) else each for each in row])
        if self.writer is not None:
            kind = name.removesuffix(".csv").replace("log", "train")
            for column, value in zip(columns[1:], row[1:]):
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{kind}/{column}", value, row[0])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Signals:
    """The first Ctrl-C, or request to end, waits for the step; the second does not."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class Run:
    """Training into a folder: steps, log, evaluations, files."""

    def __init__(
        self,
        config: Config,
        images: Images,
        mesh: DeviceMesh,
        out: Path,
        *,
        val: list[Path] | None = None,
        resume: str = "auto",
        init: Path | None = None,
        on_bad: str = "fail",
        progress: bool = True,
    ) -> None:
        self.config, self.out, self.on_bad = config, out, on_bad
        self.first = mesh.get_local_rank() == 0
        self.mesh = mesh
        self.val = {path.stem: read_verification_set(path) for path in val or []}
        if len(self.val) < len(val or []):
            raise TrainingError("two of the --val sets have one name")
        state = self._state_to_resume(resume)
        self.trainer = Trainer(config, images, mesh, init if state is None else None)
        self.data = TrainingSet(images, config, on_bad)
        self.best, self.step_of_best = -1.0, 0
        self.pending: list[Any] = []  # of the steps since the last line of the log: loss, angle, accuracy
        if state is not None:
            self._check_same(state)
            self.trainer.load(state)
            self.best, self.step_of_best = state["best"]
            self.pending = [list(each) for each in state["pending"]]
        if self.first:
            out.mkdir(parents=True, exist_ok=True)
            if state is None:  # nothing of an earlier run is to be taken for this one's
                for name in ("last.pt", "best.pt", "embedder.pt"):
                    (out / name).unlink(missing_ok=True)
                shutil.rmtree(out / "tensorboard", ignore_errors=True)
            elif not (out / "best.pt").exists():  # of a run that goes on in another folder
                self.best, self.step_of_best = -1.0, 0
            described = {**dataclasses.asdict(config), "classes": images.classes, "images": len(images)}
            (out / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        self.log = Log(out if self.first else None, self.trainer.step)
        self.progress = progress and self.first

    # ---- resuming --------------------------------------------------------------------------------------------------

    def _state_to_resume(self, resume: str) -> dict[str, Any] | None:
        """What rank 0 read, on rank 0; on the others all of it but tensors, which they are sent where they belong.

        They need not see its files, and all do as it does."""
        answer: list[Any] = [None, None]  # what it found, or why it refuses
        state = None
        if self.first:
            try:
                state = self._read_state(resume)
                answer[0] = state and {name: state[name] for name in state if name not in _SENT}
            except RecipeError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, group_src=0, group=self.mesh.get_group())
        if answer[1] is not None:
            raise TrainingError(answer[1])
        if answer[0] is None or state is not None:
            return state
        return {**answer[0], **{name: {} for name in _SENT}}

    def _read_state(self, resume: str) -> dict[str, Any] | None:
        path = self.out / "last.pt" if resume in ("auto", "never") else Path(resume)
        if resume == "never" or (resume == "auto" and not path.exists()):
            return None
        state: dict[str, Any] = load_plain(path)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise TrainingError(f"{path} is not the state of a training run")
        return state

    def _check_same(self, state: dict[str, Any]) -> None:
        before = {**state["config"], "classes": state["classes"], "images": state["images"]}
        now = {**dataclasses.asdict(self.config), "classes": self.trainer.classes, "images": self.trainer.places.count}
        of_step = before["batch"] * before["accumulate"] * state["ranks"]
        if of_step == self.trainer.places.of_step:  # of the same images, by other ranks
            before.update(batch=now["batch"], accumulate=now["accumulate"])
        differing = [name for name in now if name not in FREE and before.get(name) != now[name]]
        if differing:
            name = differing[0]
            raise TrainingError(
                f"{self.out} was begun with {name} {before.get(name)!r}, not {now[name]!r}; choose another --out, or "
                f"--resume never"
            )

    # ---- steps -----------------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """Trains to the end. Raises Stopped where it was asked to end before, TrainingError where the loss is none."""
        trainer, config = self.trainer, self.config
        shown = tqdm(
            total=trainer.steps,
            initial=trainer.step,
            desc="train",
            unit="step",
            disable=not self.progress,
            smoothing=0.1,
        )
        loader = self._loader()
        self._began, self._counted, self._busy = time.perf_counter(), trainer.step, False
        with shown, _Signals() as signals:
            while trainer.step < trainer.steps:
                per_epoch = trainer.places.steps
                trainer.places.epoch, trainer.places.start = divmod(trainer.step, per_epoch)
                batches = iter(loader)
                for _ in range(trainer.places.start, per_epoch):
                    found = trainer.run_step([next(batches) for _ in range(config.accumulate)])
                    self.pending.append(found)
                    shown.update()
                    step = trainer.step
                    ended = step % per_epoch == 0
                    if step % config.log_every == 0 or ended:
                        self._write_log(shown)
                    stop = self._agreed(signals.asked, step)
                    if ended or _is_due(step, config.eval_every):
                        self._evaluate(shown)
                    if ended or stop or _is_due(step, config.save_every):
                        self._check_losses()
                        self.save()
                    if self._busy:  # images a second are of steps alone
                        self._began, self._counted, self._busy = time.perf_counter(), step, False
                    if stop and step < trainer.steps:
                        self.log.close()
                        raise Stopped
            self.log.close()

    def _loader(self) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            cast(Any, self.data),
            self.config.batch,
            sampler=cast(Any, self.trainer.places),
            num_workers=self.config.workers,
            drop_last=True,
            pin_memory=self.trainer.device.type == "cuda",
            persistent_workers=self.config.workers > 0,
            worker_init_fn=_begin_worker,
        )

    def _agreed(self, asked: bool, step: int) -> bool:
        """Whether to stop: ranks ask each other now and then, one alone need not wait."""
        if self.trainer.world == 1:
            return asked
        if step % self.config.log_every:
            return False
        seen = torch.tensor(int(asked), device=self.trainer.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return bool(seen.item())

    def _check_losses(self) -> list[list[float]]:
        """Those since the last line of the log, as numbers. TrainingError names the step of one that is not finite."""
        self.pending = [each.tolist() if isinstance(each, Tensor) else list(each) for each in self.pending]
        first = self.trainer.step - len(self.pending)
        for place, numbers in enumerate(self.pending):
            if not math.isfinite(numbers[0]):
                self.log.close()
                raise TrainingError(
                    f"the loss of step {first + place + 1} is {numbers[0]}; last.pt is of a step before it. A lower "
                    f"--lr or scale, or --amp none, may help"
                )
        return self.pending

    def _write_log(self, shown: Any) -> None:
        numbers = self._check_losses()
        now = time.perf_counter()
        images = (self.trainer.step - self._counted) * self.trainer.places.of_step
        speed = images / max(1e-9, now - self._began)
        self._began, self._counted = now, self.trainer.step
        loss, angle, accuracy = (sum(each[k] for each in numbers) / len(numbers) for k in range(3))
        rate = rate_at(self.config, self.trainer.step - 1, self.trainer.steps, self.trainer.warmup)
        degrees = math.degrees(angle)
        epoch = self.trainer.step / self.trainer.places.steps
        self.log.add("log.csv", Log.columns, [self.trainer.step, epoch, rate, loss, degrees, accuracy, speed])
        shown.set_postfix_str(
            f"{speed:,.0f} images/s, loss {loss:.3f}, angle {degrees:.1f}°, accuracy {accuracy:.3f}", refresh=False
        )
        self.pending = []

    # ---- evaluation and files --------------------------------------------------------------------------------------

    def _evaluate(self, shown: Any) -> None:
        """Every rank embeds its share of each set's images; rank 0 counts."""
        self._busy = True
        if not self.val:
            return
        embedder = self.trainer.embedder()
        row: list[Any] = [self.trainer.step]
        columns, accuracies, curves = ["step"], [], {}
        world, rank = self.trainer.world, self.trainer.rank
        for name, found in self.val.items():
            mine = found.images[rank::world]
            embeddings = protocols.embed_set(embedder, mine, name, None, progress=False)
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, embeddings, group=self.mesh.get_group())
            whole = torch.empty(len(found.images), embeddings.shape[1])
            for place, part in enumerate(everywhere):
                whole[place::world] = part
            pairs = protocols.two_by_two(whole, found.same)
            report = protocols.report(pairs, "insightface")
            curves[name] = pairs
            accuracies.append(report.get("accuracy", 1 - report["eer"]))
            columns += [f"{name}_accuracy", f"{name}_eer"]
            row += [accuracies[-1], report["eer"]]
            if self.progress:
                shown.write(f"step {self.trainer.step}: {name} {accuracies[-1]:.4f}, EER {report['eer']:.4f}")
        self.log.add("val.csv", columns, row)
        mean = sum(accuracies) / len(accuracies)
        if mean > self.best:
            self.best, self.step_of_best = mean, self.trainer.step
            if self.first:
                embedder.thresholds = protocols.thresholds_of(curves.values())
                embedder.save(self.out / "best.pt")

    def save(self) -> None:
        """last.pt and embedder.pt. Every rank calls it."""
        self._busy = True
        state = self.trainer.state()
        state["best"] = (self.best, self.step_of_best)
        state["pending"] = self.pending  # numbers, since _check_losses
        if self.first:
            save_whole(state, self.out / "last.pt")
            self.trainer.embedder().save(self.out / "embedder.pt")
        dist.barrier(group=self.mesh.get_group())


def _begin_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one says when to end


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# ---- the command ---------------------------------------------------------------------------------------------------

_FLAGS: list[tuple[str, Any]] = [  # settings that have an option of their own
    *((name, str) for name in ("net", "loss", "amp")),
    *((name, int) for name in ("epochs", "batch", "accumulate", "workers", "seed")),
    *((name, float) for name in ("lr", "warmup", "ema", "sample_rate")),
    *((name, bool) for name in ("sync_bn", "grad_checkpointing", "compile")),
]


def add_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """``train`` to the recipe's."""
    made = commands.add_parser("train", help="a network with a margin loss; under torchrun on many ranks")
    made.add_argument("--data", type=Path, required=True, help="a folder of classes, or train.rec")
    made.add_argument("--out", type=Path, required=True, help="the run's folder")
    made.add_argument("--config", choices=list(CONFIGS), default="ms1mv3_r50", help="settings to begin with")
    for name, kind in _FLAGS:
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            made.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            made.add_argument(flag, type=kind, default=None, choices=list(LOSSES) if name == "loss" else None)
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; loss.NAME=VALUE")
    made.add_argument("--val", type=Path, nargs="+", default=[], metavar="BIN", help="verification sets")
    made.add_argument("--resume", default="auto", help="auto (from OUT/last.pt, if it is there), never, or a last.pt")
    made.add_argument(
        "--init", type=Path, metavar="PT", help="the network's weights to begin from, by InsightFace's names"
    )
    made.add_argument("--on-bad", choices=["skip", "fail"], default="fail", help="images that cannot be read")
    made.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    made.set_defaults(run=_run)


def config_of(options: argparse.Namespace) -> Config:
    """The named settings with the options' changes."""
    config = CONFIGS[options.config]
    given = {name: getattr(options, name) for name, _ in _FLAGS if getattr(options, name) is not None}
    if given.get("loss", config.loss) != config.loss:
        config = dataclasses.replace(config, loss_options={})  # which are another loss's
    config = dataclasses.replace(config, **given)
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"expected --set KEY=VALUE, but got {text!r}")
        config = changed(config, key, value)
    config.check()
    make_loss(config, 2, device="meta")
    return config


def _run(options: argparse.Namespace) -> int:
    config = config_of(options)
    images = open_images(options.data)
    with ranks(options.device) as mesh:
        run = Run(
            config,
            images,
            mesh,
            options.out,
            val=options.val,
            resume=options.resume,
            init=options.init,
            on_bad=options.on_bad,
        )
        if run.first:
            print(
                f"{len(images):,} images of {images.classes:,} classes, {mesh.size()} rank(s) on {mesh.device_type}, "
                f"{run.trainer.steps:,} steps from step {run.trainer.step:,}"
            )
        try:
            run()
        except Stopped:
            if run.first:
                print(
                    f"stopped after step {run.trainer.step:,}; the same command goes on from {options.out / 'last.pt'}"
                )
            return 130
        if run.first:
            best = f", best.pt is of step {run.step_of_best:,} ({run.best:.4f})" if run.best >= 0 else ""
            print(f"{options.out}: embedder.pt is of step {run.trainer.step:,}{best}")
    return 0
