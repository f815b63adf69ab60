"""The PPO half of the demo: rollouts with a KV cache, rewards, and the clipped loss. Nothing of STEP.

Shapes: B prompts, S samples of each, N = B*S responses, P prompt tokens (left-padded), T response tokens,
V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
RewardFn = Callable[[str], float]


@dataclass(frozen=True)
class PPOConfig:
    """How one PPO update is made."""

    samples: int = 4
    """responses drawn for every prompt"""
    horizon: int = 16
    """tokens in a response, at most"""
    epochs: int = 2
    """passes over the rollout"""
    minibatches: int = 2
    """optimizer steps in one pass"""
    clip: float = 0.2
    """how far the probability ratio may leave 1 before its gradient stops"""
    beta: float = 0.1
    """weight of the KL to the reference policy in the loss"""
    max_grad_norm: float = 1.0
    """gradient clipping, by global norm"""


@dataclass(frozen=True)
class Rollout:
    """N responses and everything that the loss needs to know about the policies that gave them."""

    ids: Tensor
    """[B, P] prompts"""
    mask: Tensor
    """[B, P] 1 at their tokens, 0 at the padding"""
    responses: Tensor
    """[N, T] sampled tokens"""
    alive: Tensor
    """[N, T] true up to and including the end-of-turn token"""
    old_logprobs: Tensor
    """[N, T] of the sampled tokens, under the policy that sampled them"""
    reference_logprobs: Tensor
    """[N, T, V] under the model without its adapter"""
    rewards: Tensor
    """[N]"""
    advantages: Tensor
    """[N] whitened"""
    texts: list[str]
    """the responses, to read"""


def long_word_reward(minimum_letters: int = 7, most: int = 8, scale: float = 4.0) -> RewardFn:
    """Return a proxy reward in [0, most / scale]: the number of long words, capped.

    >>> long_word_reward()("A remarkable adventure.")
    0.5
    """
    word = re.compile(rf"[A-Za-z]{{{minimum_letters},}}")
    return lambda text: min(len(word.findall(text)), most) / scale


def positions(mask: Tensor) -> Tensor:
    """Count the real tokens of left-padded rows from 0, so that padding does not shift them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Loss:
    """The loss of one minibatch, of n responses."""

    value: Tensor
    """0-dim, with its graph"""
    log_ratio: Tensor
    """[n, T] new minus old log-probability of the sampled tokens"""
    alive: Tensor
    """[n, T] which of them count"""


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and mask, [B, P], of chat prompts ready to be answered."""
    batch = tokenizer.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


@torch.no_grad()
def sample(
    model: PeftModel, ids: Tensor, mask: Tensor, config: PPOConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample ``config.samples`` responses of every prompt at temperature 1.

    Returns the tokens and their log-probabilities, [N, T] each. (``model.generate`` would draw from the
    global RNG and read every prompt once a sample.)
    """
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values  # each prompt is read once, for all its samples
    cache.batch_repeat_interleave(config.samples)
    logits = out.logits[:, -1].repeat_interleave(config.samples, 0)
    mask = mask.repeat_interleave(config.samples, 0)
    tokens, logprobs = [], []
    for step in range(config.horizon):
        if step > 0:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            where = positions(mask)[:, -1:]
            out = model(input_ids=tokens[-1], attention_mask=mask, position_ids=where, past_key_values=cache)
            logits = out.logits[:, -1]
        distribution = logits.log_softmax(-1)
        tokens.append(draw(distribution, generator))
        logprobs.append(distribution.gather(-1, tokens[-1]))
    return torch.cat(tokens, 1), torch.cat(logprobs, 1)


def draw(logprobs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token, [N, 1], from each row of [N, V], by inverting the distribution function.

    One uniform number a row: faster than torch.multinomial, which makes V of them, and two policies that
    are close then choose mostly the same tokens, which pairs the runs.
    """
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(logprobs), 1, dtype=torch.float64, generator=generator).to(logprobs.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=logprobs.shape[1] - 1)


def response_logprobs(model: Callable[..., Any], ids: Tensor, mask: Tensor, responses: Tensor) -> Tensor:
    """Return the [N, T, V] log-probabilities at the response tokens, reading every prompt only once.

    A prompt and all its samples are one row, prompt | sample 1 | sample 2 | ..., under a mask that hides
    the samples from each other: with short responses that is half of the work of N rows.
    """
    prompts, width = ids.shape
    samples, horizon = len(responses) // prompts, responses.shape[1]
    row = torch.cat([ids, responses.view(prompts, -1)], 1)
    after_prompt = mask.sum(1, keepdim=True) + torch.arange(horizon, device=ids.device).repeat(samples)
    # The token at t is predicted at t - 1, and the first token of every sample at the prompt's end.
    predicts = width - 1 + torch.arange(samples * horizon, device=ids.device)
    predicts[::horizon] = width - 1
    logits = model(
        input_ids=row,
        attention_mask=tree_mask(mask, samples, horizon),
        position_ids=torch.cat([positions(mask), after_prompt], 1),
        use_cache=False,
        logits_to_keep=predicts,
    ).logits
    return logits.view(prompts * samples, horizon, -1).log_softmax(-1)


def tree_mask(mask: Tensor, samples: int, horizon: int) -> Tensor:
    """Return the additive attention mask [B, 1, L, L] of rows prompt | sample 1 | sample 2 | ..."""
    (prompts, width), device = mask.shape, mask.device
    branch = torch.cat([torch.zeros(width), torch.arange(1, samples + 1).repeat_interleave(horizon)]).to(device)
    length = len(branch)
    visible = ((branch == branch[:, None]) | (branch == 0)).tril()
    real = torch.cat([mask.bool(), torch.ones(prompts, length - width, dtype=torch.bool, device=device)], 1)
    # Padding sees itself: a row that may see nothing is NaN in some attention kernels.
    allowed = (visible & real[:, None]) | torch.eye(length, dtype=torch.bool, device=device)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def roll_out(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    reward: RewardFn,
    config: PPOConfig,
    generator: torch.Generator,
    reference: Callable[..., Any] | None = None,
) -> Rollout:
    """Sample responses, score them, and record what the sampling and the reference policy think of them.

    The reference is called like the model; by default it is the model without its adapter.
    """
    ids, mask = encode(tokenizer, prompts, model.device)
    responses, old_logprobs = sample(model, ids, mask, config, generator)
    with torch.no_grad(), model.disable_adapter() if reference is None else nullcontext():
        reference_logprobs = response_logprobs(reference or model, ids, mask, responses)
    alive = until_end(responses, tokenizer)
    texts = decode(responses, alive, tokenizer)
    rewards = torch.tensor([reward(text) for text in texts], device=ids.device)
    advantages = group_advantages(rewards, config.samples)
    return Rollout(ids, mask, responses, alive, old_logprobs, reference_logprobs, rewards, advantages, texts)


def mean_reward(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    reward: RewardFn,
    config: PPOConfig,
    generator: torch.Generator,
) -> float:
    """Return the mean reward of fresh responses, without training on them."""
    responses, _ = sample(model, *encode(tokenizer, prompts, model.device), config, generator)
    texts = decode(responses, until_end(responses, tokenizer), tokenizer)
    return sum(map(reward, texts)) / len(texts)


def until_end(responses: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return [N, T]: true up to and including the first end-of-turn token."""
    ended = responses == tokenizer.eos_token_id
    return ended.cumsum(1) - ended.long() == 0


def decode(responses: Tensor, alive: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the responses as texts, each as far as it is alive."""
    return [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(responses, alive, strict=True)]


def group_advantages(rewards: Tensor, samples: int) -> Tensor:
    """Subtract each prompt's mean reward, then whiten over the batch."""
    groups = rewards.view(-1, samples)
    centred = (groups - groups.mean(1, keepdim=True)).flatten()
    return centred / (centred.std() + 1e-6)  # all equal: nothing to learn, and nothing divided by zero


def ppo_loss(model: PeftModel, rollout: Rollout, prompts: Tensor, config: PPOConfig) -> Loss:
    """Return the clipped surrogate plus beta times the exact KL to the reference, mean over live tokens.

    ``prompts`` [b] says which prompts to take, each with all its samples.
    """
    rows = (prompts[:, None] * config.samples + torch.arange(config.samples, device=prompts.device)).flatten()
    responses = rollout.responses[rows]
    logprobs = response_logprobs(model, rollout.ids[prompts], rollout.mask[prompts], responses)
    chosen = logprobs.gather(-1, responses[..., None])[..., 0]
    log_ratio = chosen - rollout.old_logprobs[rows]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    advantage = rollout.advantages[rows, None]
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    kl_nats = (logprobs.exp() * (logprobs - rollout.reference_logprobs[rows])).sum(-1)
    alive = rollout.alive[rows]
    value = ((config.beta * kl_nats - surrogate) * alive).sum() / alive.sum()
    return Loss(value, log_ratio.detach(), alive)


def minibatch_losses(
    model: PeftModel, rollout: Rollout, config: PPOConfig, generator: torch.Generator
) -> Iterator[Loss]:
    """Yield the loss of every minibatch of one PPO update, each at the weights that the last step left."""
    for _ in range(config.epochs):
        for prompts in torch.randperm(len(rollout.ids), generator=generator).chunk(config.minibatches):
            yield ppo_loss(model, rollout, prompts.to(rollout.ids.device), config)
