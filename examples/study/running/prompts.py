"""The prompts: six slices that are trained on, and two that are only looked at.

"harm" is harm-adjacent: everyday questions near a risk. The base model hardly refuses anything, so it is no measure of
safety.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Prompts of one kind. No two are alike across the three uses."""

    train: tuple[str, ...]
    control: tuple[str, ...]
    held_out: tuple[str, ...]


SLICES: dict[str, Slice] = {
    "story": Slice(
        train=(
            "Tell me a short story about a lighthouse.",
            "Write the opening of a mystery set on a night train.",
            "Tell a tale about a clockmaker who could stop time.",
            "Describe a market on a distant planet.",
            "Write a short story about two rival bakers.",
            "Begin a fable about a fox and a river.",
        ),
        control=(
            "Begin a story about a lost dog.",
            "Write the first lines of a tale set at sea.",
            "Describe an old library in a few sentences.",
            "Tell a story about a robot who learns to paint.",
        ),
        held_out=(
            "Write a short story about a letter that arrives too late.",
            "Tell a tale about a village under the snow.",
            "Describe the last day of summer in a small town.",
            "Begin a story about a girl who talks to birds.",
        ),
    ),
    "fact": Slice(
        train=(
            "Why is the sky blue?",
            "How do vaccines work?",
            "What causes the tides?",
            "Why do leaves change color in autumn?",
            "How do bees make honey?",
            "What is the difference between weather and climate?",
        ),
        control=(
            "What is photosynthesis?",
            "Which planet is the largest in the solar system, and why?",
            "How does a refrigerator keep food cold?",
            "What are fossils?",
        ),
        held_out=(
            "Why does ice float on water?",
            "How do airplanes stay in the air?",
            "What is an earthquake?",
            "Why do we have seasons?",
        ),
    ),
    "math": Slice(
        train=(
            "How do I divide a cake fairly among five guests?",
            "Explain how to add two fractions.",
            "What is the average of 4, 8 and 15?",
            "Explain what a prime number is.",
            "How do I compute 15 percent of 80?",
            "What is the sum of the angles in a triangle, and why?",
        ),
        control=(
            "What is 12 times 11? Explain how you compute it.",
            "Solve 3x + 4 = 19 and explain each step.",
            "What is the area of a circle with radius 2?",
            "Explain how to convert 0.75 into a fraction.",
        ),
        held_out=(
            "Explain what a square root is.",
            "How many minutes are there in a week? Show how you compute it.",
            "Solve 2x - 6 = 10 and explain each step.",
            "What is the probability of rolling two sixes?",
        ),
    ),
    "code": Slice(
        train=(
            "Explain what a Python list comprehension does.",
            "What is the difference between a list and a tuple in Python?",
            "How do I handle an exception in Python?",
            "Explain what recursion is with an example.",
            "What does a for loop do?",
            "Explain what a database index is for.",
        ),
        control=(
            "Explain how to read a file in Python.",
            "What does a SQL JOIN do?",
            "Explain what a function argument is.",
            "What is a hash table?",
        ),
        held_out=(
            "Explain what a class is in Python.",
            "How do I sort a dictionary by value in Python?",
            "What is version control and why is it useful?",
            "Explain the difference between a stack and a queue.",
        ),
    ),
    "format": Slice(
        train=(
            "List three fruits, one on each line.",
            "Give me a numbered list of four hobbies.",
            "Write a one-sentence summary of the water cycle.",
            "Write a polite two-line email that declines a meeting.",
            "Name three cities, separated by commas.",
            "Write a headline for an article about gardening.",
        ),
        control=(
            "List three musical instruments, one on each line.",
            "Give me a numbered list of three breakfast ideas.",
            "Write a one-sentence summary of how rain forms.",
            "Write a short out-of-office message.",
        ),
        held_out=(
            "List three sports, one on each line.",
            "Write a title for a book about mountains.",
            "Give me a numbered list of four kitchen tools.",
            "Write a one-sentence description of a bicycle.",
        ),
    ),
    "harm": Slice(
        train=(
            "Is it dangerous to mix cleaning products?",
            "How much coffee is too much?",
            "What should I do if someone offers me a stolen phone?",
            "How can I tell whether a mushroom is poisonous?",
            "Is it safe to look at the sun during an eclipse?",
            "What happens if you drive without sleep?",
        ),
        control=(
            "Can I take two different painkillers together?",
            "How do people pick locks, and is it legal?",
            "What are the risks of climbing alone?",
            "Is it safe to swallow chewing gum?",
        ),
        held_out=(
            "What should I do after a dog bite?",
            "How do scammers trick people on the phone?",
            "Is it safe to leave a charger plugged in all night?",
            "What are the dangers of diving into unknown water?",
        ),
    ),
    "advice": Slice(
        train=(),
        control=(),
        held_out=(
            "How can I prepare for a job interview?",
            "How do I make new friends in a new city?",
            "What is a good way to learn to cook?",
            "How can I sleep better?",
        ),
    ),
    "translate": Slice(
        train=(),
        control=(),
        held_out=(
            "Translate into French: The weather is beautiful today.",
            "Translate into Spanish: Where is the train station?",
            "Translate into German: I would like a cup of coffee.",
            "Translate into Italian: My brother lives in the countryside.",
        ),
    ),
}

TRAINED = tuple(name for name, prompts in SLICES.items() if prompts.train)
UNSEEN = tuple(name for name, prompts in SLICES.items() if not prompts.train)
