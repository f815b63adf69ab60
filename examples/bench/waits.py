"""Does what only saves waits on an accelerator save any? ``python examples/bench/waits.py --device cuda`` (minutes).

Committed steps of one run, in turns: as they are; with the reference judged before the inner step, where the device
has to be waited for (`Step`, ``may_wait``); and with every tensor copied and compared by itself (`snapshot.store`,
``_parts``). The ratios are paired: each round makes one step of every kind. A ratio near 1 says: take it out.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import peft
import torch
import transformers

from step_optim import ControlSet, STEPOptimizer, TokenKL
from step_optim.snapshot import store
from step_optim.step.step import Step


@contextmanager
def as_it_is() -> Iterator[None]:
    """Nothing is changed."""
    yield


@contextmanager
def early() -> Iterator[None]:
    """Whether the reference is stale is asked before the inner step."""
    begin = Step.begin

    def begin_without_waiting(step: Step) -> None:
        step._may_wait = False
        begin(step)

    with mock.patch.object(Step, "begin", begin_without_waiting):
        yield


@contextmanager
def one_by_one() -> Iterator[None]:
    """No two tensors are copied or compared together."""
    with mock.patch.object(store, "_parts", lambda tensors: ([tensor] for tensor in tensors)):
        yield


KINDS: dict[str, Callable[[], object]] = {"as it is": as_it_is, "judged early": early, "one by one": one_by_one}


def make(layers: int, width: int, device: torch.device) -> tuple[list[torch.Tensor], STEPOptimizer]:
    """A Llama of random weights with LoRA on all linears, and its optimizer; every step is committed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(1, width // 128),
    )
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).to(device)
    prompts = [torch.randint(4096, (16,)).tolist() for _ in range(16)]
    responses = [torch.randint(4096, (24,)).tolist() for _ in range(16)]
    trained = [p for p in model.parameters() if p.requires_grad]
    kl = TokenKL(model, ControlSet.from_ids(prompts, responses).to(device), noise_floor=False)
    return trained, STEPOptimizer(torch.optim.AdamW(trained, lr=1e-4), kl=kl, budget=1e6)


def step_seconds(trained: list[torch.Tensor], optimizer: STEPOptimizer) -> float:
    """One committed step on fresh gradients."""
    for p in trained:
        p.grad = torch.randn_like(p)
    synchronize = torch.cuda.synchronize if trained[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    optimizer.step()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model")
    parser.add_argument("--width", type=int, default=576, help="its hidden size")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what peft calls
    device = torch.device(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    runs = {}
    for name, changed in KINDS.items():
        with changed():
            runs[name] = make(args.layers, args.width, device)
            for _ in range(3):  # plans and buffers are made
                step_seconds(*runs[name])
    for _ in range(args.rounds):
        for name, changed in KINDS.items():
            with changed():
                seconds[name].append(step_seconds(*runs[name]))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{args.layers} layers of width {args.width}, {args.rounds} rounds, {where}, torch {torch.__version__}\n")
    print("| committed step | median ms | x as it is, paired median (range) |\n| --- | --- | --- |")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["as it is"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {1000 * statistics.median(found):.1f} | {spread} |")


if __name__ == "__main__":
    main()
