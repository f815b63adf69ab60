"""Reading arguments that hold one item a prompt: what is meant as a list, and what only looks like one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def is_list(values: Any, *, ordered: bool = True) -> bool:
    """Whether these are items: a list, array, generator ...; not a text, a mapping, or (where order matters) a set."""
    if isinstance(values, (str, bytes, Mapping)) or getattr(values, "ndim", 1) == 0:
        return False
    if isinstance(values, (set, frozenset)):
        return not ordered
    return isinstance(values, Iterable) or hasattr(values, "__getitem__")


def listed(values: Any) -> list[Any]:
    """Return the items; those of arrays and tensors as plain python values, nested where they have more dimensions."""
    items: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    return items


def plain(value: Any) -> Any:
    """Return a number of numpy or torch as python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def shown(value: Any) -> str:
    """Show a value in a message, on one line and not at length."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def items(values: Any, name: str) -> list[Any]:
    """Return one item a prompt, and refuse a single text, which would be read letter by letter.

    Raises:
        TypeError: no list; the message has the argument's ``name``.
    """
    if isinstance(values, str):
        raise TypeError(f"{name}={shown(values)} is one text; give a list of texts, {name}=[{shown(values)}]")
    if not is_list(values):
        raise TypeError(f"{name}={shown(values)} is no list; give one text for each prompt, in order")
    return list(values)


def response_texts(responses: Any) -> list[str]:
    """Return the texts of the responses.

    Raises:
        TypeError: no list of texts.
    """
    texts = items(responses, "responses")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"the response of prompt {i} is {shown(text)}; give its text")
    return texts
