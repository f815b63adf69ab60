"""A small control set whose responses are given as texts: questions that nobody trains on, with answers."""

from __future__ import annotations

from demo.prompts import chat
from transformers import PreTrainedTokenizerBase

from step_optim import ControlSet

CONTROL = {
    "story": (
        (
            "Begin a story about a lost dog.",
            "The rain had stopped an hour ago, but Biscuit still did not know which street led home.",
        ),
        (
            "Write the first sentence of a tale set at sea.",
            "On the ninth morning without wind, the captain finally opened the letter he had sworn to burn.",
        ),
        (
            "Describe an old library in one sentence.",
            "Dust hung in the light between the shelves, and every book seemed to be holding its breath.",
        ),
    ),
    "fact": (
        (
            "What is photosynthesis?",
            "Photosynthesis is how plants use sunlight to turn water and carbon dioxide into sugar and oxygen.",
        ),
        (
            "Which planet is the largest in the solar system?",
            "Jupiter is the largest planet; more than a thousand Earths would fit inside it.",
        ),
        (
            "Who painted the Mona Lisa?",
            "The Mona Lisa was painted by Leonardo da Vinci in Florence, beginning around the year 1503.",
        ),
    ),
    "math": (
        ("What is 12 times 11?", "12 times 11 is 132, because 12 times 10 is 120 and 120 plus 12 is 132."),
        ("Solve 3x + 4 = 19.", "Subtract 4 from both sides to get 3x = 15, then divide by 3: x = 5."),
        ("What is the area of a circle with radius 2?", "The area is pi times 2 squared, so 4 pi, about 12.57."),
    ),
    "code": (
        ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b\n\nprint(add(2, 3))"),
        ("How do I read a file in Python?", 'with open("notes.txt") as file:\n    text = file.read()\n'),
        ("Write a SQL query that counts the users.", "SELECT COUNT(*) AS total FROM users WHERE active = 1;"),
    ),
}
"""Slice -> (prompt, fixed response) pairs; none of the prompts is trained on."""

RESPONSE_TOKENS = 16


def control_set(tokenizer: PreTrainedTokenizerBase) -> ControlSet:
    """Build the control set: four slices of three prompts, teacher-forced over at most 16 tokens each."""
    pairs = [pair for slice_pairs in CONTROL.values() for pair in slice_pairs]
    owners = [name for name, slice_pairs in CONTROL.items() for _ in slice_pairs]
    return ControlSet.from_texts(
        tokenizer,
        [chat(tokenizer, question) for question, _ in pairs],
        [answer for _, answer in pairs],
        slices={name: [i for i, owner in enumerate(owners) if owner == name] for name in CONTROL},
        max_response_tokens=RESPONSE_TOKENS,
    )
