"""Audits: KL closures, and what they measure with."""

from step_optim.audit.closure import Audit, FunctionKL, KLClosure, as_kl, kl_closure
from step_optim.audit.logit_kl import LogitKL
from step_optim.audit.policy_kl import PolicyKL
from step_optim.audit.reference_kl import ReferenceKL
from step_optim.audit.token_kl import TokenKL

__all__ = [
    "Audit",
    "FunctionKL",
    "KLClosure",
    "LogitKL",
    "PolicyKL",
    "ReferenceKL",
    "TokenKL",
    "as_kl",
    "kl_closure",
]
