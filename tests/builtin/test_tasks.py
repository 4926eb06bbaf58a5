"""Held-out tasks: deterministic, and graders that accept right and refuse wrong answers."""

import json
from random import Random

import pytest

from batching.builtin import tasks
from batching.builtin.corpus.chatml import tool_call_text
from batching.builtin.corpus.stories import story


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_prompts_are_deterministic_and_held_out_by_seed(kind: str) -> None:
    def shown(seed: int) -> list[tuple[object, object]]:
        return [(task.messages, task.prompt) for task in tasks.prompts(kind, 5, seed)]

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_no_grader_accepts_empty_or_unrelated_text(kind: str) -> None:
    for task in tasks.prompts(kind, 5):
        assert not task.grade("")
        assert not task.grade("I do not know that.")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        tasks.prompts("poetry", 1)


@pytest.mark.parametrize(
    ("grade", "right", "wrong"),
    [
        (tasks.last_number("72"), "27 + 45 = 72.", "27 + 45 = 721."),
        (tasks.last_number("72"), "72", "72 or 73"),
        (tasks.mentions("Paris"), "The capital of France is Paris.", "It is Parisian."),
        (tasks.mentions("São Tomé"), "It is São Tomé.", "It is Sao Tome."),
        (tasks.says("1, 2, 3."), "1, 2, 3.\n", "1, 3, 2."),
        (tasks.valid_json, '{"a": 1}', '{"a": 1'),
        (tasks.valid_json, "{}", "[1]"),
        (tasks.equals_json('{"a": 1, "b": "x"}'), '{"b": "x", "a": 1}', '{"a": 1}'),
    ],
)
def test_graders(grade: tasks.Grade, right: str, wrong: str) -> None:
    assert grade(right)
    assert not grade(wrong)


def test_the_tool_call_grader_wants_one_call_with_the_right_arguments() -> None:
    call = {"name": "get_weather", "arguments": {"city": "Malé"}}
    grade = tasks.calls(call)
    right = tool_call_text(**call)
    assert grade(right)
    assert not grade(json.dumps(call))
    assert not grade(right.replace("Malé", "Male"))
    assert not grade(right + right)
    assert not grade("Sure! " + right)


def test_the_story_grader_wants_what_was_asked_for() -> None:
    fox = story(Random(1), 1, animal="fox")
    assert tasks.tells("animal=fox")(fox)
    assert not tasks.tells("animal=bear")(fox)
    assert not tasks.tells("animal=fox")(fox[:-3])


def test_a_story_completion_is_graded_together_with_its_opening() -> None:
    whole = story(Random(2), 1)
    opening = whole[: len(whole) // 3]
    rest = whole.removeprefix(opening)
    assert tasks.continues(opening)(rest)
    assert not tasks.continues(opening)(whole)
    assert not tasks.continues(opening)(rest.replace(" ", "  ", 1))
