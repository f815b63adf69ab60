"""Stores whose tensors come and go, as gradients do: what is put back is what was captured, whatever was before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step_optim.snapshot.store import TensorStore
from tests.strategies import bits

KINDS = {
    "matrix": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(4, 3).t(),
    "vector": lambda: torch.randn(5),
    "half": lambda: torch.randn(5).half(),
    "empty": lambda: torch.zeros(0),
    "scalar": lambda: torch.randn(()),
    "expanded": lambda: torch.randn(1).expand(6),
    "wider expanded": lambda: torch.randn(2)[:1].expand(6),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "integers": lambda: torch.randint(9, (3,)),
    "a part": lambda: torch.randn(10)[1:6],
    "parameter": lambda: torch.nn.Parameter(torch.randn(2, 2)),
}


def scribble(tensor: Tensor) -> None:
    """Write other bits."""
    with torch.no_grad():
        memory = tensor if tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size() else tensor[:1]
        memory.copy_(memory + 1)


@settings(max_examples=150)
@given(data=st.data())
def test_a_store_serves_one_list_of_tensors_after_another(data) -> None:
    """Lists of the same kinds in other memory, of other kinds, with shared tensors, or of none at all."""
    store = TensorStore()
    names = data.draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=5))
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):  # as a rule gradients have the shapes that they had
            names = data.draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=5))
        tensors = [KINDS[name]() for name in names]
        if tensors and data.draw(st.booleans()):
            tensors.append(tensors[0])
        store.capture(tensors)
        assert store.covers(tensors)
        assert not store.changed()
        before, versions = [bits(tensor) for tensor in tensors], [tensor._version for tensor in tensors]
        written = [tensor for tensor in tensors if tensor.numel() and data.draw(st.booleans())]
        for tensor in written:
            scribble(tensor)
        assert bool(store.changed()) == bool(written)
        swapped = [t for t in tensors if data.draw(st.booleans()) and t.is_contiguous()]
        for tensor in swapped:
            tensor.data = tensor.data.clone() + 1
        store.restore()
        assert [bits(tensor) for tensor in tensors] == before
        for tensor, version in zip(tensors, versions, strict=True):
            if not any(tensor is other for other in (*written, *swapped)):
                assert tensor._version == version
        if data.draw(st.booleans()):
            store.forget()
            assert not store.covers(tensors) or not tensors
            store.restore()  # there is nothing to put back
