"""Questions that the project makes up, and what counts as a right answer."""

from collections import Counter

import pytest

from recycle.data import DataError
from recycle.data.tasks import PER_KIND, is_right, make_tasks
from recycle.data.text import TRIVIAL_LINE

# Of each kind the first for seed 0, worked out by hand.
FIRST = {
    "arithmetic/add": ("Calculate 72 + 15.", "87"),
    "arithmetic/subtract": ("What is 84 minus 29?", "55"),
    "arithmetic/multiply": ("Calculate 2 x 14.", "28"),
    "arithmetic/remainder": ("What is the remainder of 34 divided by 7?", "6"),
    "arithmetic/compare": ("Write down the larger one of 67 and 50.", "67"),
    "strings/reverse": ("Write the letters 'ufih' in reverse order.", "hifu"),
    "strings/count": ("Count the letter 'c' in 'window falcon'.", "1"),
    "strings/upper": ("How does 'lizard marble' look in all capitals?", "LIZARD MARBLE"),
    "strings/initials": (
        "Which letters do these words start with, in one string: rocket, dragon, palace, dinner?",
        "rdpd",
    ),
    "strings/letter": ("In the word 'bacon', which letter comes first?", "b"),
    "lists/sort": ("Arrange the list 59, 74, 78, 95 so that the numbers go up.", "59, 74, 78, 95"),
    "lists/maximum": ("What is the largest number in 8, 51, 75?", "75"),
    "lists/sum": ("Find the total of 8, 5, 3.", "16"),
    "lists/length": ("Count the words in the list fabric, ocean, tiger, grape, water.", "5"),
    "lists/distinct": ("Write the list 3, 4, 3, 1, 5 without repeated numbers.", "3, 4, 1, 5"),
    "lists/item": ("Give the first word in cloud, cattle, arrow.", "cloud"),
}
MOST = PER_KIND * len(FIRST)


def test_the_first_of_each_kind() -> None:
    tasks = make_tasks(len(FIRST), 0)
    assert {task.kind: (task.prompt, task.answer) for task in tasks} == FIRST
    assert {task.name for task in tasks} == {f"{kind}-0000" for kind in FIRST}
    assert [task.kind for task in tasks] != list(FIRST)  # shuffled


def test_all_that_there_are() -> None:
    tasks = make_tasks(MOST, 1)
    assert set(Counter(task.kind for task in tasks).values()) == {PER_KIND}
    assert len({task.name for task in tasks}) == len({task.prompt for task in tasks}) == MOST
    assert all(task.name.startswith(f"{task.kind}-") for task in tasks)
    assert all(len(task.prompt.splitlines()) == 1 for task in tasks)
    assert min(len(task.prompt) for task in tasks) >= TRIVIAL_LINE
    # Hardly an answer is a line that two share, so that few count as copies of each other.
    long = [task.answer for task in tasks if len(task.answer) >= TRIVIAL_LINE]
    assert len(set(long)) > 0.99 * len(long) > 500
    assert all(is_right(task.answer, task.answer) for task in tasks)


@pytest.mark.parametrize("kind", ["arithmetic/add", "lists/maximum", "strings/reverse"])
def test_no_question_comes_again_in_other_words(kind: str) -> None:
    prompts = [task.prompt for task in make_tasks(MOST, 2) if task.kind == kind]
    if kind == "strings/reverse":
        asked = [prompt.split("'")[1] for prompt in prompts]
    else:
        asked = ["".join(x if x.isdigit() else " " for x in prompt) for prompt in prompts]
        asked = [" ".join(numbers.split()) for numbers in asked]
    assert len(set(asked)) == PER_KIND


def test_kinds_are_mixed_evenly_and_a_larger_count_adds_tasks() -> None:
    few, more = make_tasks(100, 3), make_tasks(500, 3)
    assert set(Counter(task.kind for task in few).values()) == {6, 7}
    assert set(few) < set(more)
    assert few == make_tasks(100, 3)
    assert not {task.prompt for task in few} <= {task.prompt for task in make_tasks(100, 4)}


@pytest.mark.parametrize("count", [-1, MOST + 1])
def test_more_than_there_are(count: int) -> None:
    with pytest.raises(DataError, match=f"There are 0 to 8000 tasks, got {count}. Ask for at most"):
        make_tasks(count, 0)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("12", "12"),
        (" 12.\n", "12"),
        ("The sum of 5 and 7 is 12.", "12"),
        ("5 + 7 = **12**", "12"),
        ("5+7=12", "12"),
        ("The answer is:\n12", "12"),
        ("The sorted list is [3,7, 9].", "3, 7, 9"),
        ('"Hifu" spelled backwards is "ufih".', "ufih"),
        ("Ufih", "ufih"),
        ("LIZARD  MARBLE", "LIZARD MARBLE"),
        ("It is Paris", "Paris."),
    ],
)
def test_right(reply: str, answer: str) -> None:
    assert is_right(reply, answer)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("", "12"),
        ("112", "12"),
        ("123", "12"),
        ("-12", "12"),
        ("1.12", "12"),
        (".5", "5"),
        ("1:12", "12"),
        ("12 or 13", "12"),
        ("It is not 12", "12"),
        ("12 is too much, it is 11", "12"),
        ("9, 3, 7", "3, 7"),
        ("3, 7, 9", "3, 7"),
        ("3 7 9", "3, 7, 9"),
        ("ufihs", "ufih"),
        ("lizard marble", "LIZARD MARBLE"),
        ("Lizard Marble", "LIZARD MARBLE"),
    ],
)
def test_wrong(reply: str, answer: str) -> None:
    assert not is_right(reply, answer)
