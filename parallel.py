"""The processes of a run, and the optimizer whose state they share out.

    torchrun --nproc-per-node N bread.py ...     (without torchrun: one process, and nothing is sent anywhere)

Each process (rank) samples and trains on its share of a step's problems with a full copy of the weights:
sampling needs one on every GPU anyway, so nothing is gathered layer by layer. Split between the ranks are the
float32 masters and AdamW's moments, 12 of the 16 bytes per parameter (ZeRO stage 1, arXiv 1910.02054): every
parameter has one owner, to whom all gradients of it are summed and who hands its new value to the others.
"""
import collections
import datetime
import math
import os
import signal

import torch
import torch.distributed as dist


class Ranks:
    """The processes of a run. Rank 0 writes files and speaks."""

    def __init__(self, device=""):
        """device: its name, "" for the first GPU or else the CPU; under torchrun each has its own."""
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
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

    def listen(self):
        """From now on SIGINT or SIGTERM is noted; the second one ends the process at once."""
        def note(number, _frame):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)
        self.handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupted(self):
        """Whether a signal came to any rank. All ask at once, so that they end after the same step."""
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

    def collect(self, tensors):
        """{name: tensor} of every rank, whole on rank 0 (on the CPU), {} elsewhere; names must differ."""
        if self.size == 1:
            return tensors
        # Objects travel pickled, tensors do not: first what will come, then one tensor at a time.
        shapes = self.gather({name: (tuple(x.shape), x.dtype) for name, x in tensors.items()})
        whole = {name: x.cpu() for name, x in tensors.items()} if self.rank == 0 else {}
        for source in range(1, self.size):
            for name, (shape, dtype) in shapes[source].items():
                if self.rank == source:
                    dist.send(tensors[name].contiguous().to(self.device), dst=0)
                elif self.rank == 0:
                    received = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(received, src=source)
                    whole[name] = received.cpu()
        return whole

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
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device is {name!r}, it must be cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but PyTorch finds no CUDA device; leave it out")
    if device.type == "cuda":
        return torch.device("cuda", device.index or 0)
    return device


class MasterAdamW:
    """AdamW on float32 masters of a model's weights, each kept by one rank; the learning rate is handed in.

    bf16 keeps 8 bits: at a learning rate of 1e-6 every step would be rounded away. Masters are stepped, and
    the weights are rounded copies of them. Float32 weights are their own masters.
    """

    def __init__(self, parameters, ranks, weight_decay=0.0):
        """parameters: of a model that is the same on all ranks, in the same order. ranks: a Ranks."""
        self.ranks = ranks
        self.weights = list(parameters)
        self.owners = ranks.owners([weight.numel() for weight in self.weights])
        self.skipped_in_a_row = 0
        self.masters = {}  # number of a parameter: its master, for those that this rank owns
        for i, weight in enumerate(self.weights):
            if self.owners[i] == ranks.rank:
                self.masters[i] = weight if weight.dtype == torch.float32 else weight.detach().float()
        # The fused form makes no temporaries as large as the model.
        self.adamw = torch.optim.AdamW(self.masters.values(), betas=(0.9, 0.95), weight_decay=weight_decay,
                                       fused=ranks.device.type == "cuda")

    @torch.no_grad()
    def step(self, lr, max_norm, loss=0.0):
        """One update by the weights' .grad, summed over ranks and clipped; returns its norm before clipping.

        A loss or norm that is not finite leaves every weight and moment as it was, and gives None.
        """
        norm, loss = self.reduce_gradients(loss)
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if is_finite:
            # As torch.nn.utils.clip_grad_norm_, without its 1e-6.
            for master in self.masters.values():
                master.grad.mul_(max_norm / max(norm, max_norm))
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.hand_out()  # by every rank, of what it owns
        self.adamw.zero_grad(set_to_none=True)
        return norm if is_finite else None

    def reduce_gradients(self, loss):
        """Move the weights' gradients, summed over ranks, to their masters: (their norm, the summed loss)."""
        for i, weight in enumerate(self.weights):
            # A weight that nothing used has no gradient, but every rank takes part in every sum.
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = None
            grad = grad.float()
            if self.ranks.size > 1:
                dist.reduce(grad, dst=self.owners[i])
            if i in self.masters:
                self.masters[i].grad = grad
        # In float64, and one wait for the device, not one a tensor.
        norms = [torch.linalg.vector_norm(x.grad, dtype=torch.float64) for x in self.masters.values()]
        squares = torch.stack(norms).square().sum().item() if norms else 0.0
        totals = self.ranks.total({"squares": squares, "loss": loss})
        return math.sqrt(totals["squares"]), totals["loss"]

    def hand_out(self):
        """Round the masters into the weights of all ranks."""
        for i, weight in enumerate(self.weights):
            if i in self.masters and self.masters[i] is not weight:
                weight.copy_(self.masters[i])
            if self.ranks.size > 1:
                dist.broadcast(weight.data, src=self.owners[i])

    def state(self):
        """{"NUMBER.master", "NUMBER.exp_avg", ...: tensor}: masters and moments of all ranks, on rank 0."""
        numbers = list(self.masters)  # AdamW itself counts its parameters from 0
        # Named by parameter, so that any number of ranks may read them.
        tensors = {f"{i}.master": master for i, master in self.masters.items()}
        for nth, moments in self.adamw.state_dict()["state"].items():
            tensors |= {f"{numbers[nth]}.{kind}": tensor for kind, tensor in moments.items()}
        return self.ranks.collect(tensors)

    @torch.no_grad()
    def restore(self, tensors):
        """Put back what `state` gave, of all ranks; ValueError for a model of other shapes."""
        moments = {i: {} for i in self.masters}
        for name, tensor in tensors.items():
            number, kind = name.split(".")
            if int(number) in moments:
                moments[int(number)][kind] = tensor
        for i, master in self.masters.items():
            saved = moments[i].pop("master", torch.empty(0))
            if saved.shape != master.shape:
                raise ValueError("the optimizer state of this checkpoint belongs to a model of other shapes")
            master.copy_(saved)
        # load_state_dict moves each moment to its master's device.
        state = {nth: kept for nth, kept in enumerate(moments.values()) if kept}
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
