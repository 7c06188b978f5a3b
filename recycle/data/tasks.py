"""Small questions with answers that can be checked, made up from a seed.

Sixteen kinds over numbers, words and lists. A kind draws what its question holds, solves it, and
words it in one of several ways; no two tasks of a kind hold the same, however they are worded.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from .text import DataError

PER_KIND = 500  # tasks of one kind at most; the smallest kinds have 600 to 800 to draw from
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_WORDS = """
    apple arrow autumn bacon basket beach bread bridge bronze butter cabin candle canyon carpet
    castle cattle cherry cloud cobalt coffee copper cotton cradle dancer desert dinner dragon
    eagle engine fabric falcon farmer feather fence finger flower forest fossil garden garlic
    ginger glacier grape guitar hammer harbor helmet honey horse island jacket jungle kettle
    kitten ladder lantern lemon letter lizard lunar magnet maple marble market meadow melon
    mirror monkey mountain needle nickel night ocean olive onion orange orchid otter oven paint
    palace panda paper parrot pebble pencil pepper piano pillow pirate planet plaza pocket
    potato puzzle rabbit radio ribbon river rocket saddle sailor salad salmon scarf school
    shadow silver spider spring square stone summer sunset table temple ticket tiger timber
    tomato tunnel turtle valley velvet violin wagon walnut water window winter wizard yellow
    zebra
""".split()  # noqa: SIM905


class Task(NamedTuple):
    kind: str  # such as "lists/sort"
    name: str  # unique, such as "lists/sort-0012"
    prompt: str  # the user's turn, one line
    answer: str  # the assistant's turn: the answer alone


class _Kind(NamedTuple):
    draw: Callable[[Random], tuple[Any, ...]]
    solve: Callable[..., Any]  # of what was drawn
    wordings: tuple[str, ...]


def make_tasks(
    count: int, seed: int, kinds: str = "", apart: Sequence[tuple[int, int]] = ()
) -> list[Task]:
    """As many tasks, of all kinds alike, in shuffled order; equal arguments give equal tasks.

    With a larger count come the same tasks and others.

    Args:
        count: Of tasks.
        seed: Of what they hold, their wording and their order.
        kinds: What the names of the kinds begin with, such as "arithmetic/".
        apart: Count and seed of other calls: what their tasks hold does not come up, in whatever
            words.

    Raises:
        DataError: There are not so many.
    """
    chosen = [name for name in _KINDS if name.startswith(kinds)]
    most = PER_KIND * len(chosen)
    if not 0 <= count <= most:
        raise DataError(f"There are 0 to {most} tasks, got {count}. Ask for at most {most}.")
    taken = set[tuple[str, tuple[Any, ...]]]()
    for other in apart:
        taken.update((task.kind, drawn) for task, drawn in _made(*other, list(_KINDS), set()))
    tasks = [task for task, _ in _made(count, seed, chosen, taken)]
    Random(seed).shuffle(tasks)
    return tasks


def _made(
    count: int, seed: int, kinds: list[str], taken: set[tuple[str, tuple[Any, ...]]]
) -> Iterator[tuple[Task, tuple[Any, ...]]]:
    """Tasks and what they hold, kind by kind."""
    for number, name in enumerate(kinds):
        kind, share = _KINDS[name], (count + len(kinds) - 1 - number) // len(kinds)
        random, seen = Random(f"{seed} {name}"), set[tuple[Any, ...]]()
        while len(seen) < share:
            drawn = kind.draw(random)
            if drawn not in seen and (name, drawn) not in taken:
                prompt = random.choice(kind.wordings).format(*map(_said, drawn))
                answer = _said(kind.solve(*drawn))
                yield Task(name, f"{name}-{len(seen):04}", prompt, answer), drawn
                seen.add(drawn)


def is_right(reply: str, answer: str) -> bool:
    """Whether a reply gives the answer, and nothing else or after its last "is", "=" or ":".

    Whitespace, quotes, asterisks, square brackets and a final period do not count. Case counts in
    an answer in capitals.
    """
    wanted, said = _plain(answer), _plain(reply)
    last = _plain(re.split(r"=|: |\bis\b", said)[-1])
    return any(wanted in (text, text.lower()) for text in (said, last))


def _plain(text: str) -> str:
    spaced = re.sub(r", ?", ", ", " ".join(text.split()))
    return spaced.lstrip(" \"'`*[").rstrip(" \"'`*].")


def _said(drawn: Any) -> str:
    return ", ".join(map(str, drawn)) if isinstance(drawn, tuple) else str(drawn)


def _pair(random: Random) -> tuple[int, int]:
    return random.randint(1, 99), random.randint(1, 99)


def _numbers(random: Random) -> tuple[tuple[int, ...]]:
    return (tuple(random.sample(range(1, 100), random.randint(3, 6))),)


def _repeated(random: Random) -> tuple[tuple[int, ...]]:
    once = random.sample(range(1, 21), random.randint(3, 4))
    items = once + random.choices(once, k=random.randint(1, 2))
    random.shuffle(items)
    return (tuple(items),)


def _list(random: Random) -> tuple[tuple[str, ...]]:
    return (tuple(random.sample(_WORDS, random.randint(3, 6))),)


def _phrase(random: Random) -> tuple[str]:
    return (" ".join(random.sample(_WORDS, 2)),)


def _phrase_and_letter(random: Random) -> tuple[str, str]:
    (phrase,) = _phrase(random)
    return phrase, random.choice(phrase.replace(" ", ""))


def _place(random: Random, items: Any) -> tuple[str, Any]:
    return random.choice(_ORDINALS[: len(items)]), items


def _at(ordinal: str, items: Any) -> Any:
    return items[_ORDINALS.index(ordinal)]


_KINDS = {
    "arithmetic/add": _Kind(
        _pair,
        lambda a, b: a + b,
        ("What is {} plus {}?", "Add the numbers {} and {}.", "Calculate {} + {}."),
    ),
    "arithmetic/subtract": _Kind(
        lambda random: tuple(sorted(_pair(random))),
        lambda a, b: b - a,
        ("What is {1} minus {0}?", "Subtract {} from {}.", "Calculate {1} - {0}."),
    ),
    "arithmetic/multiply": _Kind(
        lambda random: (random.randint(2, 9), random.randint(2, 99)),
        lambda a, b: a * b,
        ("What is {} times {}?", "Multiply {} by {}.", "Calculate {} x {}."),
    ),
    "arithmetic/remainder": _Kind(
        lambda random: (random.randint(10, 99), random.randint(2, 9)),
        lambda a, b: a % b,
        (
            "What is the remainder of {} divided by {}?",
            "Divide {} by {} and give only the remainder.",
            "How much is left over when {} is shared out in groups of {}?",
        ),
    ),
    "arithmetic/compare": _Kind(
        lambda random: (*random.sample(range(1, 100), 2), random.choice(("larger", "smaller"))),
        lambda a, b, which: (max if which == "larger" else min)(a, b),
        (
            "Which number is {2}, {0} or {1}?",
            "Of {0} and {1}, name the {2} number.",
            "Write down the {2} one of {0} and {1}.",
        ),
    ),
    "strings/reverse": _Kind(
        lambda random: ("".join(random.sample("abcdefghijklmnopqrstuvwxyz", 4)),),
        lambda text: text[::-1],
        (
            "Write the letters '{}' in reverse order.",
            "What is '{}' spelled backwards?",
            "Reverse the string '{}'.",
        ),
    ),
    "strings/count": _Kind(
        _phrase_and_letter,
        lambda phrase, letter: phrase.count(letter),
        (
            "How many times does '{}' contain the letter '{}'?",
            "Count the letter '{1}' in '{0}'.",
            "In '{}', how often do you see the letter '{}'?",
        ),
    ),
    "strings/upper": _Kind(
        _phrase,
        str.upper,
        (
            "Write '{}' in capital letters.",
            "Change '{}' to upper case.",
            "How does '{}' look in all capitals?",
        ),
    ),
    "strings/initials": _Kind(
        _list,
        lambda words: "".join(word[0] for word in words),
        (
            "Join the first letters of these words: {}.",
            "Take the first letter of each word and write them together: {}.",
            "Which letters do these words start with, in one string: {}?",
        ),
    ),
    "strings/letter": _Kind(
        lambda random: _place(random, random.choice(_WORDS)),
        _at,
        (
            "What is the {} letter of '{}'?",
            "Give the {} letter in the word '{}'.",
            "In the word '{1}', which letter comes {0}?",
        ),
    ),
    "lists/sort": _Kind(
        _numbers,
        lambda items: tuple(sorted(items)),
        (
            "Sort these numbers from smallest to largest: {}.",
            "Put {} in ascending order.",
            "Arrange the list {} so that the numbers go up.",
        ),
    ),
    "lists/maximum": _Kind(
        _numbers,
        max,
        (
            "What is the largest number in {}?",
            "Find the maximum of {}.",
            "Which of these numbers is the greatest: {}?",
        ),
    ),
    "lists/sum": _Kind(
        lambda random: (tuple(random.choices(range(1, 10), k=random.randint(3, 4))),),
        sum,
        (
            "What is the sum of {}?",
            "Add up all the numbers in this list: {}.",
            "Find the total of {}.",
        ),
    ),
    "lists/length": _Kind(
        _list,
        len,
        (
            "How many items are in this list: {}?",
            "Count the words in the list {}.",
            "Give the length of the list {}.",
        ),
    ),
    "lists/distinct": _Kind(
        _repeated,
        lambda items: tuple(dict.fromkeys(items)),
        (
            "Remove the duplicates from {}.",
            "Keep only the first of each number in {}.",
            "Write the list {} without repeated numbers.",
        ),
    ),
    "lists/item": _Kind(
        lambda random: _place(random, *_list(random)),
        _at,
        (
            "What is the {} item of this list: {}?",
            "Give the {} word in {}.",
            "From the list {1}, pick the {0} one.",
        ),
    ),
}
