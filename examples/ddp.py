"""One policy on several processes: DistributedDataParallel, or FSDP2, under one budget.

Each process trains on its own data and audits its own part of the control set. The parts are put together before
anything is decided, so that every process takes the same decision on the same figures. Process 0 prints them.

    python examples/ddp.py --ranks 2            # DDP; starts the processes itself
    python examples/ddp.py --ranks 2 --fsdp     # fully_shard
    torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from step_optim import Budget, ControlSet, STEPOptimizer, TokenKL

VOCABULARY, LENGTH, STEPS, SPIKE, LEARNING_RATE = 32, 12, 8, 5, 1e-2


class Model(nn.Module):
    """The smallest causal language model: the next token depends on this one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V]."""
        hidden = self.embed(input_ids)
        return self.head(hidden + self.block(hidden))


def count(starts: torch.Tensor) -> torch.Tensor:
    """Return one sequence per start, [B, LENGTH]: start, start + 1, start + 2, ..."""
    return (starts[:, None] + torch.arange(LENGTH)) % VOCABULARY


def train(fsdp: bool, device: str) -> None:
    """Train on this process, together with the others."""
    torch.manual_seed(0)  # the same weights everywhere
    model: nn.Module = Model().to(device)
    if fsdp:
        fully_shard(model.block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)

    texts = count(torch.arange(0, VOCABULARY, 4)).tolist()
    control = ControlSet.from_ids(
        prompts=[ids[:4] for ids in texts],
        responses=[ids[4:] for ids in texts],
        slices={"low": range(4), "high": range(4, 8)},
        device=device,
    )
    optimizer = STEPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),  # made after the model was wrapped
        kl=TokenKL(model, control, micro_batch=2, shard=True),  # every process has the whole set, and audits a part
        budget=Budget(mean=0.05, slices=0.06),
    )

    torch.manual_seed(1 + dist.get_rank())  # other data everywhere
    for step in range(STEPS):
        ids = count(torch.randint(VOCABULARY, (16,))).to(device)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (20 if step == SPIKE else 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            last = optimizer.last
            kl = f"KL candidate {last.candidate.mean:.5f} accepted {last.accepted.mean:.5f}"
            print(f"step {step}  loss {loss.item():.3f}  {kl}  {last.action:6}  alpha {last.alpha:.3f}")
    show_that_all_agree(model, optimizer)


def show_that_all_agree(model: nn.Module, optimizer: STEPOptimizer) -> None:
    """Compare weights and figures of all processes, bit for bit."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    mine = [p.detach().cpu().numpy().tobytes() for p in whole], optimizer.last.accepted
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    assert all(theirs == mine for theirs in everywhere), "the processes have come apart"
    if dist.get_rank() == 0:
        print(f"{len(everywhere)} processes hold the same bits")


def start(rank: int, ranks: int, init_method: str, fsdp: bool) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    nccl = torch.cuda.device_count() >= ranks
    if nccl:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if nccl else "gloo", init_method=init_method, rank=rank, world_size=ranks)
    train(fsdp, "cuda" if nccl else "cpu")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, unless torchrun has started them")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights, too")
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun, on one machine
        start(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", args.fsdp)
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(start, args=(args.ranks, f"file://{folder}/store", args.fsdp), nprocs=args.ranks)
