"""The processes of a run: torchrun's, their devices, what they tell each other, and signals.

    rank, world, device = start_processes("auto")          # from torchrun's environment, or alone
    total = sum_over_processes(torch.tensor(0.5))          # the same on each
"""

import os
import signal
import sys
from contextlib import suppress

import torch
import torch.distributed as dist

from coco_eval import UserError


def check_device(device):
    """The device's name, if it can be used; UserError otherwise."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {device} cannot be used: {reason}") from None
    return device


def count_cores():
    """The CPU cores for this process: its share of the machine's, or what it is allowed to use."""
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else share   # Linux
    return min(share, allowed)


def start_processes(device):
    """(rank, world, device) of this process, from torchrun's environment; else (0, 1, device).

    Small things travel between the processes as CPU tensors over gloo, gradients on GPUs over nccl.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU, "
                            f"{torch.cuda.device_count()} visible: start fewer, or --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if device == "mps" and "RANK" in os.environ:
        raise UserError("--device mps trains on one process: start train.py without torchrun")
    if world > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world}, but RANK is not set: start all processes with "
                        f"torchrun, or unset WORLD_SIZE")
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):         # all on this machine
            # torchrun keeps the store over restarts, and in it the addresses of the processes
            # before (pytorch issue 135712); several machines may count their restarts differently
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if "cuda" in device else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, check_device(device)


# -- what they tell each other ---------------------------------------------------------------------

def sum_over_processes(tensor):
    """The sum of a CPU tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(mine):
    """The objects of all processes, a list by rank, on each process."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def check_ranks_agree(options):
    """Raises UserError if the processes of a run have different options or data, a dict."""
    everyone = gather(options)
    for rank, theirs in enumerate(everyone):
        differ = [f"{name} is {value!r} on rank 0, {theirs.get(name)!r} on rank {rank}"
                  for name, value in everyone[0].items()
                  if name not in ("num_workers", "device") and theirs.get(name) != value]
        if differ:
            raise UserError(f"the processes were not started alike: {'; '.join(differ)}"[:2000])


# -- signals ---------------------------------------------------------------------------------------

def catch_signals():
    """A dict whose "stop" becomes 1.0 on Ctrl-C, SIGTERM or SIGHUP (a number, as processes add it
    up), and "code" 128 + the signal.

    A second Ctrl-C exits at once, and so does the first signal while "safe" is set, when nothing
    would be lost.
    """
    interrupt = {"stop": 0.0, "code": 130, "safe": False}

    def handler(number, frame):
        again = interrupt["stop"]
        interrupt.update(stop=1.0, code=128 + number)
        if not again and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):                                  # the terminal may be gone
                os.write(2, b"\nstopping after this step (Ctrl-C again: at once)\n")
        if interrupt["safe"] or again and number == signal.SIGINT:
            sys.exit(interrupt["code"])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGINT)                # Windows lacks some
        if signal.getsignal(number) != signal.SIG_IGN:               # as nohup has SIGHUP
            signal.signal(number, handler)
    return interrupt


def ignore_signals(worker):
    """For loader workers: Ctrl-C, torchrun and batch systems signal all processes of a run, but the
    training process alone decides what to do, and needs its workers until it has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):                     # Windows lacks some
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))        # from end_workers


def end_workers():
    """Ends the loader workers of this process, which Python's own SIGTERM at exit would not."""
    for worker in torch.multiprocessing.active_children():
        if hasattr(signal, "SIGUSR1"):
            os.kill(worker.pid, signal.SIGUSR1)
