"""Section "graph": the control forward as a CUDA graph, and how near the audit is to the device's peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench import Bench
from measure import Figure, timed
from progress import Progress
from torch import Tensor
from workload import Workload

from step_optim import ControlSet
from step_optim.audit.batches import micro_batch_of

HEAD_PASSES = 4
"""Times that the [R, V] float32 values of the head blocks cross the memory: two GEMMs write, the KL reads both."""


def measure_graph(workload: Workload, rounds: int, progress: Progress) -> dict[str, Any]:
    """Roofline everywhere; the graph where there is CUDA."""
    bench = Bench(workload.model("lora"), workload.batch(), workload.control())
    found: dict[str, Any] = {"roofline": roofline(bench, workload, rounds)}
    progress.say("graph: roofline measured")
    if workload.device.type == "cuda":
        try:
            found["graph"] = captured(bench, workload.device, rounds)
        except RuntimeError as error:  # an operation that cannot be captured
            progress.skip("graph, capture", str(error).splitlines()[0][:200])
    return found


def repeated(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds, after one call that does not count."""
    call()
    return Figure.of([timed(call, device) for _ in range(rounds)]).median


def micro_batches(control: ControlSet) -> list[Tensor]:
    """The control set's ids, longest first, padded a few prompts at a time."""
    texts = [torch.cat(pair) for pair in zip(control.prompts, control.responses, strict=True)]
    texts.sort(key=len, reverse=True)
    size = micro_batch_of(control, None)
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in parts]


def captured(bench: Bench, device: torch.device, rounds: int) -> dict[str, Any]:
    """Eager seconds, and those of a replay; both give the same logits.

    Padding stands on the right, where a causal model's other tokens do not see it: no mask is
    passed, whose checks cannot be captured.
    """
    batches = micro_batches(bench.control)
    model = bench.model.eval()

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [model(input_ids=ids, use_cache=False).logits for ids in batches]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream(device).wait_stream(side)
    eager = forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = forward()
    graph.replay()
    torch.cuda.synchronize(device)
    off = max(float((a.float() - b.float()).abs().max()) for a, b in zip(eager, static, strict=True))
    del eager
    return {
        "eager": repeated(forward, device, rounds),
        "graph": repeated(graph.replay, device, rounds),
        "largest_difference": off,
    }


def roofline(bench: Bench, workload: Workload, rounds: int) -> dict[str, float]:
    """The audit's seconds, and the least that its arithmetic and its memory traffic need at measured peak rates."""
    head = bench.model.get_output_embeddings().weight
    body = [p for p in bench.model.parameters() if p is not head]
    block = bench.control.response_tokens * head.shape[0]
    exact = head.is_cuda and head.element_size() == 2  # its products are made by tensor cores, and summed in float32
    bench.start.put_back()
    bench.kl.anchor()
    batches = audited_tokens(bench)
    tokens, rates = sum(batches), peak_rates(workload)
    flops = (
        2 * sum(p.numel() for p in body) * tokens / rates["body_flops"]
        + 4 * block * head.shape[1] / rates["body_flops" if exact else "head_flops"]
    )
    read = sum(p.numel() * p.element_size() for p in body) * len(batches) + 2 * head.numel() * head.element_size()
    moved = (read + HEAD_PASSES * 4 * block) / rates["bytes"]
    audit = repeated(bench.kl.audit, workload.device, rounds)
    return {"audit": audit, "arithmetic": flops, "traffic": moved, "share": max(flops, moved) / audit, **rates}


def audited_tokens(bench: Bench) -> list[int]:
    """Tokens, with their padding, of every forward that an audit makes."""
    seen: list[int] = []
    hook = bench.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].numel())
    )
    try:
        bench.kl.audit()
    finally:
        hook.remove()
    return seen


def peak_rates(workload: Workload) -> dict[str, float]:
    """Measured: large matmuls in the body's dtype and in float32, which the head runs in; a large copy."""
    large = workload.device.type == "cuda"
    side, count = (8192, 1 << 30) if large else (1024, 1 << 26)

    def flops(dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=workload.device).to(dtype) for _ in range(2))
        return 2 * side**3 / repeated(lambda: a @ b, workload.device, 5)

    source = torch.zeros(count, dtype=torch.uint8, device=workload.device)
    target = torch.empty_like(source)
    copied = 2 * count / repeated(lambda: target.copy_(source), workload.device, 5)
    return {"body_flops": flops(workload.dtype), "head_flops": flops(torch.float32), "bytes": copied}
