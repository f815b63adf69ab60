"""What can be set on the command line of the demo."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from smollm import DEFAULT_MODEL

CONTROLLERS = ("interpolate", "gate", "project")


@dataclass(frozen=True)
class Args:
    """The command line; the help of `parse_args` says what each field is."""

    model: str
    updates: int
    seed: int
    controller: str
    budget_mean: float
    budget_slices: float
    shock_at: int
    out: str
    tiny: bool

    @property
    def shock(self) -> int:
        """The update that is shocked; 0 if the run is over before it."""
        return self.shock_at if self.shock_at <= self.updates else 0


def parse_args(description: str | None, argv: list[str] | None = None) -> Args:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="demo", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, "(default: %(default)r)"
    add("--model", default=DEFAULT_MODEL, help=f"a hub id, or a directory written by save_pretrained {default}")
    add("--updates", type=int, default=8, help=f"PPO updates in each run {default}")
    add("--seed", type=int, default=0, help=f"of the adapter's first weights and of every rollout {default}")
    text = f"what happens to an update that is over budget {default}"
    add("--controller", choices=CONTROLLERS, default="interpolate", help=text)
    text = f"eps_g: largest movement of one update, mean over the control set [nats per token] {default}"
    add("--budget-mean", type=float, default=0.03, help=text)
    add("--budget-slices", type=float, default=0.05, help=f"eps_s: the same for each of its slices {default}")
    text = f"the update whose learning rate is four times too large, counted from 1; 0 for none {default}"
    add("--shock-at", type=int, default=5, help=text)
    add("--out", default="runs/demo", help=f"directory for the traces and the picture {default}")
    text = "a tiny random model in place of --model: seconds, nothing to download"
    add("--tiny", action="store_true", help=text)
    args = Args(**vars(parser.parse_args(argv)))
    if args.updates < 1:
        parser.error(f"--updates {args.updates}: at least 1 is needed")
    if not (args.budget_mean > 0 and args.budget_slices > 0):
        parser.error("--budget-mean and --budget-slices must be above 0 nats per token")
    return args
