"""One policy on several processes: every rank takes the same decision on the same figures.

python examples/ddp.py                  # two processes, DistributedDataParallel
python examples/ddp.py --fsdp           # fully_shard instead: DTensor parameters
torchrun --nproc-per-node 4 examples/ddp.py
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from step_optim import ControlSet, STEPOptimizer, TokenKL

VOCAB, WIDTH = 64, 32


class Model(nn.Module):
    """A language model small enough to be read: the next token depends on this one. Logits [B, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, V] for token ids [B, T]."""
        logits: Tensor = self.head(self.body(self.embed(ids)))
        return logits.clone()  # FSDP2 warns of outputs that are views


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start; not under torchrun (%(default)s)")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights with fully_shard")
    parser.add_argument("--steps", type=int, default=8, help="training steps (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=5e-4, help="KL of a step, nats per token (%(default)s)")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Train on this rank's part of the data."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model: nn.Module = Model()
    if args.fsdp:
        fully_shard(model.body)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)

    random = torch.Generator().manual_seed(1)
    texts = torch.randint(0, VOCAB, (16, 12), generator=random).tolist()
    control = ControlSet.from_ids([t[:4] for t in texts], [t[4:] for t in texts], slices={"a": [*range(8)]})
    # Wrap after sharding. shard=True: each rank evaluates a part of the control set.
    kl = TokenKL(model, control, shard=True)
    optimizer = STEPOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), kl, budget=args.budget)

    random.manual_seed(100 + rank)
    for step in range(args.steps):
        ids = torch.randint(0, VOCAB, (32, 8), generator=random)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = optimizer.last
        if rank == 0:
            print(
                f"step {step}  loss {float(loss.detach()):.3f}  proposed {last.candidate.mean:.5f}  "
                f"committed {last.accepted.mean:.5f}  {last.action}, alpha {last.alpha:.3f}"
            )
    whole = [p.full_tensor() if args.fsdp else p for p in model.parameters()]
    checksum = sum(float(p.detach().double().square().sum()) for p in whole)
    checksums: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(checksums, checksum)
    if rank == 0:
        print(f"weights on {len(checksums)} ranks: {'the same' if len(set(checksums)) == 1 else 'NOT the same'}")


def start(rank: int, args: argparse.Namespace, store: str) -> None:
    """Run one of the processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    train(args)
    dist.destroy_process_group()


def main() -> None:
    """Start the processes, unless torchrun has done so."""
    args = parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        train(args)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(start, (args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
