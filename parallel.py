"""The processes of a run: which problems are whose, sums over all of them, and who keeps which optimizer state.

    torchrun --nproc-per-node N bread.py ...         (without torchrun: one process, and every method here is a no-op)

Each process (rank) samples and trains on its share of a step's problems, with a full copy of the weights: sampling
needs one on every GPU anyway, so training uses it too, and nothing is gathered layer by layer. Split between the ranks
are the float32 masters and AdamW's moments, 12 of the 16 bytes per parameter (ZeRO stage 1, arXiv 1910.02054): every
parameter has one owner, to whom all gradients of it are summed and who hands its new value to the others.
"""
import datetime
import os

import torch
import torch.distributed as dist


class Ranks:
    """The processes of a run. rank 0 writes files and speaks."""

    def __init__(self, device):
        """device: a torch.device; under torchrun "cuda" becomes this process's own GPU. Joins the group."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            # Ranks wait for each other while the slowest samples: an hour, not the default ten minutes.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=1))

    def share(self, items):
        """This rank's part of a list: dealt like cards."""
        return items[self.rank::self.size]

    def gather(self, mine):
        """The inverse of `share`: every rank's items (Python objects), in the order of the whole, on every rank.

        >>> ranks = Ranks(torch.device("cpu"))           # one process
        >>> ranks.gather(ranks.share(["a", "b", "c"]))
        ['a', 'b', 'c']
        """
        if self.size == 1:
            return mine
        parts = [None] * self.size
        dist.all_gather_object(parts, mine)
        whole = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank::self.size] = part
        return whole

    def sum(self, numbers):
        """Sums over all ranks of a list of numbers, in float64."""
        if self.size == 1:
            return list(numbers)
        # float32 cannot count beyond 2^24.
        total = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, value):
        """Rank 0's value (a Python object) on every rank."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def owners(self, sizes):
        """The rank that keeps the optimizer state of each parameter: the largest first, to whoever has least."""
        loads, owners = [0] * self.size, [0] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += sizes[i]
        return owners

    def reduce(self, tensor, owner):
        """Sum a tensor over all ranks, in place on its owner; elsewhere it holds nothing of use afterwards."""
        if self.size > 1:
            dist.reduce(tensor, dst=owner)
        return tensor

    def broadcast(self, tensor, owner):
        """Overwrite a tensor with its owner's, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=owner)

    def collect(self, tensors):
        """{name: tensor} of every rank, one dictionary on rank 0 (on the CPU), {} elsewhere; names must differ."""
        if self.size == 1:
            return tensors
        shapes = [None] * self.size
        dist.all_gather_object(shapes, {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()})
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
        """Wait for all ranks, then part: where one exits with an error code, torchrun kills those that still save."""
        if self.size > 1:
            self.sum([0.0])  # dist.barrier() on NCCL prints a warning
            dist.destroy_process_group()
