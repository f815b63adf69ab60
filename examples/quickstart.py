"""Quickstart: an AdamW step that may not move the policy further than its budget.

A tiny random language model learns to count up and down. At step 6 the learning rate is 100 times too large: STEP
measures on the control set how far that step would move the model, and commits only the part that fits the budget.

    python examples/quickstart.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from step_optim import Budget, ControlSet, Interpolate, STEPOptimizer, TokenKL

VOCABULARY, LENGTH, STEPS, SPIKE, LEARNING_RATE = 32, 12, 12, 6, 3e-3


def count(starts: torch.Tensor, stride: int) -> torch.Tensor:
    """Return one sequence per start, [B, LENGTH]: start, start + stride, start + 2 stride, ..."""
    return (starts[:, None] + stride * torch.arange(LENGTH)) % VOCABULARY


torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small is faster on one
size = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(size)  # any causal language model

# Where the policy must not jump: fixed prompts with their responses, in named slices.
texts = torch.cat([count(torch.arange(0, 32, 8), +1), count(torch.arange(0, 32, 8), -1)]).tolist()
control = ControlSet.from_ids(
    prompts=[ids[:4] for ids in texts],
    responses=[ids[4:] for ids in texts],
    slices={"up": range(4), "down": range(4, 8)},
)

optimizer = STEPOptimizer(
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),  # any torch optimizer
    kl=TokenKL(model, control),
    budget=Budget(mean=0.05, slices=0.06),  # nats per token, in one step
    controller=Interpolate(),  # commits the largest part that fits; or Gate(), Project()
)

for step in range(STEPS):
    ids = count(torch.randint(VOCABULARY, (16,)), stride=+1 if step % 2 else -1)
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * (100 if step == SPIKE else 1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    last = optimizer.last  # the record of this step
    kl = f"KL candidate {last.candidate.mean:6.4f} accepted {last.accepted.mean:6.4f}"
    worst = "worst slice {:4} {:6.4f}".format(*last.candidate.worst)
    print(f"step {step:2}  loss {loss.item():.3f}  {kl}  {worst}  {last.action:6}  alpha {last.alpha_realised:.3f}")

summary = optimizer.summary()
for name in ("steps", "commits", "shrinks", "rejects", "trigger_rate", "max_accepted_kl", "max_accepted_slice_kl"):
    print(f"{name:21}  {summary[name]:.4g}")
