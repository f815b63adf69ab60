"""Prompts of everyday kinds, by slice: what the model should go on saying as it did before."""

from __future__ import annotations

PROMPTS: dict[str, tuple[str, ...]] = {
    "story": (
        "Write the first sentence of a story about a lighthouse keeper.",
        "Begin a tale in which a fox loses its shadow.",
        "Tell a very short story about a broken clock.",
        "How might a story about two rival bakers start?",
        "Write an opening line for a ghost story set on a train.",
        "Describe a quiet village just before a storm.",
        "Invent a hero who is afraid of the sea, and introduce her.",
        "Start a fable about a crow and a river.",
        "Write one sentence in the voice of an old sailor.",
        "Open a mystery in which a painting goes missing.",
    ),
    "fact": (
        "What is the capital of Norway?",
        "Why does ice float on water?",
        "Which planet is the largest in our solar system?",
        "Who wrote the play Hamlet?",
        "What do bees make honey from?",
        "How many bones does an adult human have?",
        "What causes the tides?",
        "In which country is the Atacama Desert?",
        "What gas do plants take in from the air?",
        "What is the boiling point of water at sea level?",
    ),
    "math": (
        "What is 17 plus 26?",
        "A book costs 12 euros and a pen 3 euros. What do two of each cost?",
        "What is half of 90?",
        "How many minutes are there in three hours?",
        "Is 51 a prime number?",
        "What is the area of a rectangle that is 4 by 7?",
        "What is 9 times 8?",
        "If a train goes 60 km in an hour, how far does it go in 20 minutes?",
        "What is the next number: 2, 4, 8, 16?",
        "What is 100 minus 37?",
    ),
    "code": (
        "Write a Python function that returns the larger of two numbers.",
        "How do I reverse a string in Python?",
        "What does a for loop do?",
        "Write a SQL query that counts the rows of a table named users.",
        "How do I read a text file line by line in Python?",
        "What is a dictionary in Python?",
        "Write a function that checks whether a number is even.",
        "How do I sort a list in descending order in Python?",
        "What is recursion?",
        "Write a line of JavaScript that prints hello.",
    ),
    "advice": (
        "How can I fall asleep more easily?",
        "Give me one tip for a job interview.",
        "How do I keep a houseplant alive?",
        "What should I pack for a weekend in the mountains?",
        "How can I remember names better?",
        "What is a good way to start running?",
        "How do I say no politely?",
        "How can I save money on food?",
        "What helps against a headache?",
        "How do I make a new friend in a new city?",
    ),
    "rewrite": (
        "Make this polite: Send me the file now.",
        "Shorten this: We would like to inform you that the shop is going to be closed tomorrow.",
        "Put this into the past tense: She walks to the market and buys bread.",
        "Correct the mistake: He don't like the rain.",
        "Say this more simply: The meeting was postponed owing to unforeseen circumstances.",
        "Turn this into a question: The bus leaves at nine.",
        "Make this sound friendly: You are late again.",
        "Replace the adjective: It was a nice evening.",
        "Say the opposite: The soup is too hot.",
        "Join these sentences: It was dark. We went home.",
    ),
}
"""Ten of each: two for the control set, six for the pool, two held out."""

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "list": ("Name three animals that live in the desert.", "List four colours of the rainbow."),
    "opinion": ("Which is better, tea or coffee?", "Is it wrong to tell a small lie?"),
}
"""Slices that only the held-out prompts have."""
