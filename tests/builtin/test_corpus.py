"""The corpus generator: deterministic, disjoint from the held-out prompts, all stories parse."""

import functools
import itertools
import json
import re
from collections.abc import Callable
from random import Random

import pytest

from batching.builtin.corpus import arithmetic, mix, ordering, stories, toolcalls, words
from batching.builtin.corpus.exchange import draw, is_held_out
from batching.builtin.corpus.storytelling import storytelling


def _texts(seed: int, count: int, long: bool = False) -> list[str]:
    drawn = itertools.islice(mix.documents(seed, long=long), count)
    return ["".join(text for text, _ in document) for document in drawn]


@functools.cache
def _joined() -> str:
    return "".join(_texts(1, 6000))


@pytest.mark.parametrize("long", [False, True])
def test_same_seed_same_documents_other_seed_other_documents(long: bool) -> None:
    assert _texts(3, 40, long) == _texts(3, 40, long)
    assert _texts(3, 40, long) != _texts(4, 40, long)


def test_held_out_share_of_addition_pairs_is_about_a_twentieth() -> None:
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    held_out = sum(is_held_out("addition", arithmetic.pair_key(a, b)) for a, b in pairs)
    assert 0.035 < held_out / len(pairs) < 0.065


@pytest.mark.parametrize(
    ("kind", "sign"), [("addition", r"\+"), ("subtraction", "-")], ids=["addition", "subtraction"]
)
def test_no_held_out_pair_occurs_anywhere_in_training_text(kind: str, sign: str) -> None:
    text = "\n".join(_texts(0, 4000))
    pairs = re.findall(rf"(?<!\d)(\d+) {sign} (\d+) = \d", text)
    assert len(pairs) > 3000
    assert not [p for p in pairs if is_held_out(kind, arithmetic.pair_key(int(p[0]), int(p[1])))]


@pytest.mark.parametrize("kind", [k for k in mix.FAMILIES if k != "smalltalk"])
def test_no_held_out_question_occurs_in_training_text(kind: str) -> None:
    """Exact questions where they end a user turn, so that none hides inside a longer one."""
    family, _ = mix.FAMILIES[kind]
    rng = Random(7)
    questions = {draw(family, rng, held_out=True).question for _ in range(60)}
    asked = set(re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", _joined(), re.DOTALL))
    assert questions.isdisjoint(asked)


def test_no_held_out_tool_question_occurs_in_training_text() -> None:
    rng = Random(7)
    held_out = (toolcalls.conversation(rng, held_out=True) for _ in range(100))
    assert not [c for c in held_out if f"user\n{c.messages[0]['content']}<|im_end|>" in _joined()]


@pytest.mark.parametrize("sign", ["+", "-", "×"])
def test_every_sum_in_the_text_is_right(sign: str) -> None:
    work = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}[sign]
    found = re.findall(rf"(?<!\d)(\d+) {re.escape(sign)} (\d+) = (\d+)\.", _joined())
    assert len(found) > 500
    assert not [row for row in found if work(int(row[0]), int(row[1])) != int(row[2])]


def test_every_story_parses_and_keeps_to_the_request() -> None:
    rng = Random(5)
    for events in (0, 1, 3, 12):
        for _ in range(40):
            asked = storytelling(rng, events)
            found = stories.bindings(asked.answer)
            assert found is not None, asked.answer
            wanted = dict(line.split("=", 1) for line in asked.expected.splitlines())
            assert wanted.items() <= found.items()


def test_every_section_template_is_used_and_recognised() -> None:
    rng = Random(6)
    text = "\n".join(stories.story(rng, 3) for _ in range(200))
    sections = (stories.OPENING, stories.LIKING, stories.PROBLEM, stories.EVENT,
                stories.MEETING, stories.SOLUTION, stories.ENDING)  # fmt: skip
    for template in itertools.chain(*sections):
        fixed = max(re.split(r"\{\w+\}", template), key=len)
        assert fixed in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s[:-1],
        lambda s: s + " The end.",
        lambda s: s.replace("\n\n", " ", 1),
        lambda s: s.replace("Mia", "Lily", 1),
        lambda s: s.replace(" fox ", " unicorn "),
        lambda s: re.sub(r"\bher\b", "his", s),
        lambda s: s.split("\n\n", 1)[1],
    ],
    ids=["cut", "extra", "paragraph", "renamed hero", "unknown animal", "pronoun", "no opening"],
)
def test_the_recogniser_refuses_damaged_stories(damage: Callable[[str], str]) -> None:
    rng = Random(8)
    for _ in range(10):
        good = stories.story(rng, 2, animal="fox", name="Mia")
        assert stories.parses(good)
        bad = damage(good)
        assert bad == good or not stories.parses(bad)


def test_reversing_sorting_and_tool_calls_are_consistent() -> None:
    rng = Random(9)
    for _ in range(50):
        turned = words.reversing(rng)
        assert turned.answer.endswith(f"{turned.expected}.")
        assert turned.expected[::-1].replace("-", "") in turned.question
        numbers = [int(n) for n in ordering.sorting(rng).expected.split(", ")]
        assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
        talk = toolcalls.conversation(rng)
        names = [tool["function"]["name"] for tool in talk.tools]
        assert talk.call["name"] in names
        assert len(set(names)) == len(names)
        assert json.loads(talk.messages[2]["content"])
