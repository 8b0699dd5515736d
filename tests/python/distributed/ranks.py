"""Functions of tests on the ranks of a group: processes that stay from test to test, in groups of any size.

A function is sent by its module and name, and called with its rank, the group's size and what else it is given.
`alone` is a group of the tests' own process.
"""

import atexit
import contextlib
import datetime
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait

_AFTER_AN_ERROR = 5  # seconds that the other ranks have once one has raised
_COLLECTIVE = 60  # seconds that one may take


class _Pool:
    """As many processes as the largest group needed so far; each is sent what to call, and says what came of it."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        self._group, self._store = None, None
        self.owner = os.getpid()

    def call(self, world, function, args, seconds, backend):
        """Of each rank (result, None) or (None, (exception type, message, traceback))."""
        self._grow(world)
        if (world, backend) != self._group:
            self._group, self._store = (world, backend), f"{self._folder.name}/store{time.monotonic_ns()}"
        task = pickle.dumps((world, backend, self._store, function.__module__, function.__name__, args))
        for pipe in self._pipes[:world]:
            pipe.send_bytes(task)
        outcomes, end = [None] * world, time.monotonic() + seconds
        while None in outcomes:
            waiting = {self._pipes[rank]: rank for rank in range(world) if outcomes[rank] is None}
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                where = self._stacks(sorted(waiting.values()))
                self.kill()
                failed = [_error_of(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome and outcome[1]]
                hanging = f"ranks {sorted(waiting.values())} of {world} hang in {function.__name__}\n{where}"
                raise AssertionError("\n".join([*failed, hanging]))
            for pipe in ready:
                try:
                    outcomes[waiting[pipe]] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.kill()
                    raise AssertionError(f"rank {waiting[pipe]} of {world} died in {function.__name__}") from None
                if outcomes[waiting[pipe]][1]:
                    end = min(end, time.monotonic() + _AFTER_AN_ERROR)
        return outcomes

    def _grow(self, world):
        """Starts what is missing. Imports take as long as they take: they do not count as a function's seconds."""
        begun = len(self._pipes)
        for rank in range(len(self._processes), world):
            ours, theirs = self._context.Pipe()
            arguments = (rank, theirs, f"{self._folder.name}/stack{rank}")
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes[begun:]:
            pipe.recv_bytes()

    def _stacks(self, ranks):
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1)
        found = []
        for rank in ranks:
            with open(f"{self._folder.name}/stack{rank}") as file:
                found.append(f"rank {rank}: {file.read()}")
        return "\n".join(found)

    def kill(self):
        for process in self._processes:
            process.kill()
        self._end()

    def close(self):
        for pipe in self._pipes:
            try:
                pipe.send_bytes(pickle.dumps(None))
            except OSError:
                pass  # it is dead
        for process in self._processes:
            process.join(10)
            process.kill()
        self._end()

    def _end(self):
        for process, pipe in zip(self._processes, self._pipes):
            process.join()
            pipe.close()
        self._folder.cleanup()


def _serve(rank, pipe, stack):
    """What a process of the pool does until it is told to end, or the tests have ended."""
    import torch
    import torch.distributed as dist

    import torchmargin  # noqa: F401

    faulthandler.register(signal.SIGUSR1, file=open(stack, "w"))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
    joined = None
    pipe.send_bytes(b"")
    while (task := _received(pipe)) is not None:
        world, backend, store, module, name, args = task
        try:
            if store != joined:
                _leave()
                if backend == "nccl":
                    torch.cuda.set_device(rank)
                place = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
                dist.init_process_group(backend, timeout=datetime.timedelta(seconds=_COLLECTIVE), **place)
                joined = store
            torch.manual_seed(rank)  # no rank has another's random numbers
            outcome = pickle.dumps((getattr(importlib.import_module(module), name)(rank, world, *args), None))
        except BaseException as error:
            outcome = pickle.dumps((None, (type(error).__name__, str(error), traceback.format_exc())))
        pipe.send_bytes(outcome)
    _leave()


def _received(pipe):
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None


def _leave():
    import torch.distributed as dist

    if dist.is_initialized():
        gc.collect()  # what holds the group (sharded modules do) goes before it
        dist.destroy_process_group()


def _error_of(rank, outcome):
    return f"rank {rank} raised\n{outcome[1][2]}"


_pool = None


def _call(world, function, args, seconds, backend):
    global _pool
    if _pool is None:
        _pool = _Pool()
        atexit.register(_close)
    try:
        return _pool.call(world, function, args, seconds, backend)
    except BaseException:
        _pool.kill()
        _pool = None
        raise


def _close():
    global _pool
    if _pool is not None and _pool.owner == os.getpid():
        _pool.close()
        _pool = None


def on(world, function, *args, seconds=120, backend="gloo"):
    """What function(rank, world, *args) returns on each of `world` ranks; an error of one is raised with its traceback.

    A rank that hangs is an AssertionError that says where, and the processes are started anew for the next test.
    """
    global _pool
    outcomes = _call(world, function, args, seconds, backend)
    failed = [_error_of(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome[1]]
    if failed:
        _pool.kill()  # what the ranks have sent each other does not match any more
        _pool = None
        raise AssertionError("\n".join(failed))
    return [result for result, _ in outcomes]


def outcomes(world, function, *args, seconds=120, backend="gloo"):
    """The same, and for a rank that raises (the exception type's name, its message)."""
    return [error[:2] if error else result for result, error in _call(world, function, args, seconds, backend)]


def share(rank, counts, tensor):
    """The rows of a rank, of tensors whose rows the ranks share by `counts`."""
    start = sum(counts[:rank])
    return tensor[start : start + counts[rank]]


@contextlib.contextmanager
def alone():
    """The mesh of a group of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        _leave()
