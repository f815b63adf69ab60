"""One hypothesis profile, and a machine that does not oversubscribe itself."""

import os

import torch
from hypothesis import HealthCheck, settings

# Examples build small models: their time varies, and says nothing about correctness.
settings.register_profile(
    "step_optim",
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
settings.load_profile("step_optim")

# Tiny models gain nothing from threads, and two threads on one core cost a lot.
torch.set_num_threads(1)
