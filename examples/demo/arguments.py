"""What can be set on the command line of the demo."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import dataclass, fields

from smollm import DEFAULT_MODEL

CONTROLLERS = ("interpolate", "gate", "project")


@dataclass(frozen=True)
class Args:
    """What can be set on the command line."""

    model: str = DEFAULT_MODEL
    """a hub id, or a directory written by save_pretrained"""
    updates: int = 8
    """PPO updates in each run"""
    seed: int = 0
    """of the adapter's first weights and of every rollout"""
    controller: str = "interpolate"
    """what happens to an update that is over budget"""
    budget_mean: float = 0.03
    """eps_g: largest movement of one update, mean over the control set [nats per token]"""
    budget_slices: float = 0.05
    """eps_s: the same for each of its slices"""
    shock_at: int = 5
    """the update whose learning rate is four times too large, counted from 1; 0 for none"""
    out: str = "runs/demo"
    """directory for the traces and the picture"""
    tiny: bool = False
    """a tiny random model in place of --model: seconds, nothing to download"""

    @property
    def shock(self) -> int:
        """The update that is shocked; 0 if the run is over before it."""
        return self.shock_at if self.shock_at <= self.updates else 0


def parse_args(description: str | None, argv: list[str] | None = None) -> Args:
    """Read the command line; the docstrings above are its help."""
    parser = argparse.ArgumentParser(
        prog="demo", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    helps = dict(re.findall(r'^    (\w+): .*\n    """(.+)"""', inspect.getsource(Args), re.M))
    for f in fields(Args):
        option, text = "--" + f.name.replace("_", "-"), f"{helps[f.name]} (default: {f.default!r})"
        if isinstance(f.default, bool):
            parser.add_argument(option, action="store_true", help=helps[f.name])
        else:
            choices = CONTROLLERS if f.name == "controller" else None
            parser.add_argument(option, type=type(f.default), default=f.default, choices=choices, help=text)
    args = Args(**vars(parser.parse_args(argv)))
    if args.updates < 1:
        parser.error(f"--updates {args.updates}: at least 1 is needed")
    if not (args.budget_mean > 0 and args.budget_slices > 0):
        parser.error("--budget-mean and --budget-slices must be above 0 nats per token")
    return args
