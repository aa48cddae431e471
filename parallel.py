"""The processes of a run, and the optimizer whose state they share out.

    torchrun --nproc-per-node N bread.py ...     (without torchrun: one process, and nothing is sent anywhere)

Each process (rank) samples and trains on its share of a step's problems with a full copy of the weights:
sampling needs one on every GPU anyway, so nothing is gathered layer by layer. Split between the ranks are the
float32 masters and AdamW's moments, 12 of the 16 bytes per parameter (ZeRO stage 1, arXiv 1910.02054): every
parameter has one owner, to whom all gradients of it are summed and who hands its new value to the others.
"""
import collections
import contextlib
import datetime
import math
import os
import re
import signal

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

MOMENTS = "exp_avg", "exp_avg_sq"


class Ranks:
    """The processes of a run. Rank 0 writes files and speaks."""

    def __init__(self, device=""):
        """device: its name, "" for the first GPU or else the CPU; under torchrun each has its own."""
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        self.step = 1       # the coming one
        self.signal = None  # that asks the run to end after this step: SIGINT or SIGTERM
        self.handlers = {}  # of signals, before `listen`
        if self.device.type == "cuda":
            if self.size > 1:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            # Triton and CUDA graphs work on the current device, whatever device their tensors are on.
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # Ranks wait for each other while the slowest samples: an hour, not the default ten minutes.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))

    def share(self, items):
        """This rank's part of a list: dealt like cards."""
        return items[self.rank::self.size]

    def gather(self, mine):
        """A picklable object of every rank, as a list in their order, on every rank.

        >>> Ranks("cpu").gather({"tokens": 12})        # one process
        [{'tokens': 12}]
        """
        if self.size == 1:
            return [mine]
        parts = [None] * self.size
        dist.all_gather_object(parts, mine)
        return parts

    def total(self, counts):
        """{name: number} summed over all ranks, of which some may lack a name."""
        totals = collections.Counter()
        for part in self.gather(dict(counts)):
            totals.update(part)  # of a Counter, this adds
        return totals

    def from_first(self, value):
        """Rank 0's value (a picklable object) on every rank."""
        return self.gather(value)[0]

    def listen(self, step):
        """From now on, with `step` steps done, SIGINT, SIGTERM or SIGHUP is noted; a second one, of any kind,
        ends the process."""
        def note(number, _frame):
            self.signal = number
            for each in self.handlers:
                signal.signal(each, signal.SIG_DFL)
            # No print: it may have been interrupted itself. And a terminal that hung up takes no word.
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing step %d, then saving; again to quit at once\n" % self.step)
        self.step = step + 1
        # Windows has no hang-up.
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        self.handlers = {number: signal.signal(number, note) for number in numbers}

    def interrupted(self):
        """Whether a signal came to any rank. All ask after every step, and so end after the same one."""
        self.step += 1
        agreed = max(self.gather(self.signal or 0))
        self.signal = agreed or self.signal  # one that came while they talked counts in the next step
        return agreed > 0

    def owners(self, sizes):
        """The rank that keeps each parameter's optimizer state: the largest first, to whoever has least."""
        loads = [0] * self.size  # parameters of each rank
        owners = [0] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += sizes[i]
        return owners

    def leave(self):
        """Give signals back and wait for all: where one exits with an error, torchrun kills the others."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.size > 1:
            # No gather: gloo's thread may free its objects while Python shuts down, and the process aborts.
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
            dist.destroy_process_group()


def pick_device(name):
    """The torch.device of that name, or the first GPU, or the CPU; ValueError if there is none."""
    if not re.fullmatch("|cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"--device is {name!r}, it must be cpu, cuda or cuda:NUMBER")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but PyTorch finds no CUDA device; leave it out")
    if device.type == "cuda":
        return torch.device("cuda", device.index or 0)
    return device


class MasterAdamW:
    """AdamW on float32 masters of a model's weights, each kept by one rank; the learning rate is handed in.

    bf16 keeps 8 bits: at a learning rate of 1e-6 every step would be rounded away. Masters are stepped, the
    weights are their rounding; a master is its weight and the 16 bits that this loses (of a float32 weight:
    itself). Gradients add up in float32: in bf16, 64 micro-batches err by 1%. Bytes a parameter: weight 2,
    bits 2, moments 8, gradient 4; with `offload` weight and gradient alone are on the device.
    """

    slice_size = 2**26  # parameters that are stepped at a time

    def __init__(self, parameters, ranks, weight_decay=0.0, offload=False):
        """parameters: float32 or bfloat16, of a model that is the same on all ranks, in the same order.
        ranks: a Ranks. offload: keep and step what this rank owns in host memory."""
        self.ranks = ranks
        self.weights = list(parameters)
        self.weight_decay = weight_decay
        self.home = torch.device("cpu") if offload else ranks.device
        self.owners = ranks.owners([weight.numel() for weight in self.weights])
        self.steps = 0
        self.skipped_in_a_row = 0
        self.is_whole = True  # for the caller to set: False while only some of a step's updates are done
        self.kept = {}  # number of a parameter that this rank owns: its moments and lost bits, flat
        for i, weight in enumerate(self.weights):
            weight.grad_dtype = torch.float32  # on every rank: what micro-batches are summed in
            if self.owners[i] == ranks.rank:
                kept = {name: torch.zeros(weight.numel(), device=self.home) for name in MOMENTS}
                if weight.dtype != torch.float32:
                    kept["lost"] = torch.zeros(weight.numel(), dtype=torch.int16, device=self.home)
                self.kept[i] = kept

    @torch.no_grad()
    def step(self, lr, max_norm, loss=0.0):
        """One update by the weights' .grad, summed over ranks and clipped; returns its norm before clipping.
        A loss or norm that is not finite leaves every weight and moment as it was, and gives None."""
        norm, loss = self.reduce_gradients(loss)
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if is_finite:
            self.steps += 1
            self.is_whole = False
            # The largest first: if memory for its slices is missing, nothing has been changed yet.
            for i in sorted(self.kept, key=lambda i: -self.weights[i].numel()):
                # Clipped as by torch.nn.utils.clip_grad_norm_, without its 1e-6.
                self.step_one(i, lr, max_norm / max(norm, max_norm))
        for weight, owner in zip(self.weights, self.owners):
            weight.grad = None
            if is_finite and self.ranks.size > 1:
                dist.broadcast(weight.data, src=owner)
        return norm if is_finite else None

    def reduce_gradients(self, loss):
        """Sum the weights' gradients over ranks, each to its owner: (norm of all, the summed loss)."""
        for i, weight in enumerate(self.weights):
            # A weight that nothing used has no gradient, but every rank takes part in every sum.
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=torch.float32)
            if self.ranks.size > 1:
                dist.reduce(weight.grad, dst=self.owners[i])
            if i not in self.kept:
                weight.grad = None
        # One wait for the device, not one a tensor.
        norm = torch.nn.utils.get_total_norm([self.weights[i].grad for i in self.kept]).item()
        totals = self.ranks.total({"squares": norm**2, "loss": loss})
        return math.sqrt(totals["squares"]), totals["loss"]

    def step_one(self, i, lr, scale):
        """AdamW of one parameter, a slice at a time: what that takes beside the state stays below 1 GB."""
        for begin in range(0, self.weights[i].numel(), self.slice_size):
            at = slice(begin, begin + self.slice_size)
            grad_n = bring(self.weights[i].grad.reshape(-1)[at], self.home).mul_(scale)
            master_n = self.master(i, at)
            moments = [[self.kept[i][name][at]] for name in MOMENTS]
            count = torch.full((), self.steps - 1.0, device=self.home)  # torch raises it, hence one a slice
            adamw([master_n], [grad_n], *moments, [], [count], fused=True, amsgrad=False, beta1=0.9,
                  beta2=0.95, lr=lr, weight_decay=self.weight_decay, eps=1e-8, maximize=False)
            self.set_master(i, at, master_n)
        self.weights[i].grad = None

    def master(self, i, at):
        """The float32 values of a slice of parameter i; of a float32 weight that is at home, itself."""
        weight_n = bring(self.weights[i].detach().view(-1)[at], self.home)
        is_whole = weight_n.dtype == torch.float32
        return weight_n if is_whole else join(weight_n, self.kept[i]["lost"][at])

    def set_master(self, i, at, master_n):
        """Put new values of a slice into the weight, and keep what rounding them loses."""
        weight_n = self.weights[i].detach().view(-1)[at]
        rounded_n = master_n
        if weight_n.dtype != torch.float32:
            rounded_n, lost_n = split(master_n)
            self.kept[i]["lost"][at] = lost_n
        send(rounded_n, weight_n)

    def state(self):
        """Yields ("NUMBER.master", tensor), ... of what this rank owns, made one by one."""
        # Named by parameter, so that any number of ranks may read what others have written.
        for i, weight in enumerate(self.weights):
            if i in self.kept:
                yield f"{i}.master", self.master(i, slice(None)).view(weight.shape)
                yield f"{i}.step", torch.tensor(float(self.steps))
                for name in MOMENTS:
                    yield f"{i}.{name}", self.kept[i][name].view(weight.shape)

    # What a rank owns it alone writes and reads: nothing passes through another's memory.
    def owns(self, name):
        """Whether a tensor of that name, as `state` gives them, belongs to this rank; no other name does."""
        return name.partition(".")[0] in map(str, self.kept)

    @torch.no_grad()
    def restore(self, tensors):
        """Put back {name: tensor} of what this rank owns; ValueError for a model of other shapes."""
        for i, kept in self.kept.items():
            saved = [tensors.get(f"{i}.{name}", torch.empty(0)) for name in ("master", *MOMENTS)]
            if any(x.shape != self.weights[i].shape for x in saved):
                raise ValueError("the optimizer state of this checkpoint belongs to a model of other shapes")
            self.set_master(i, slice(None), saved[0].view(-1).to(self.home))
            for name, moment in zip(MOMENTS, saved[1:]):
                kept[name].copy_(moment.view(-1))
            self.steps = int(tensors[f"{i}.step"])


def bring(x, device):
    """x on a device; from a GPU to the host through pinned memory, and waited for."""
    there = x.to(device, non_blocking=True)
    if x.is_cuda and not there.is_cuda:  # the host would read it before the copy has ended
        torch.cuda.current_stream(x.device).synchronize()
    return there


def send(x, target):
    """Copy x into target; from pinned memory a GPU copies while the host goes on."""
    target.copy_(x.pin_memory() if target.is_cuda and not x.is_cuda else x, non_blocking=True)


def split(master_n):
    """Float32 numbers -> (rounded to bfloat16, the 16 bits that this loses: int16); `join` goes back."""
    rounded_n = master_n.bfloat16()
    upper_n = rounded_n.view(torch.int16).int() << 16
    # What lies halfway between two bf16 numbers and was rounded down does not fit 16 bits: an ulp less does.
    return rounded_n, (master_n.view(torch.int32) - upper_n).clamp_(max=2**15 - 1).to(torch.int16)


def join(rounded_n, lost_n):
    """bfloat16 numbers and the bits that rounding lost -> float32."""
    # A bf16 number is the upper half of a float32 one.
    return ((rounded_n.view(torch.int16).int() << 16) + lost_n).view(torch.float32)
