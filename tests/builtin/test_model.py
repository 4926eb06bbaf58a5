"""The committed model folder: small, loadable, multi-byte safe, and about as good as its card."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from batching.builtin import evaluate, tasks
from batching.builtin.corpus.chatml import Message, render

MODEL = Path(evaluate.__file__).parent / "model"
TEXTS = (
    "Hello, world! 27 + 45 = 72.",
    "São Tomé, Reykjavík, Chișinău, Malé, Nuku'alofa",
    "😊🐱 👩‍👩‍👧‍👦 ☕️ こんにちは 안녕하세요 नमस्ते 你好，世界",
    "tabs\tand\n\nnew lines  and   spaces ",
    "\x00\x7f ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
)
CALL = {"function": {"name": "get_time", "arguments": {"city": "Malé", "hours": 2}}}
TALK: list[Message] = [
    {"role": "system", "content": "Be nice."},
    {"role": "user", "content": "What time is it in Malé?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **CALL}]},
    {"role": "tool", "content": '{"time": "10:15"}'},
    {"role": "assistant", "content": "It is 10:15 in Malé."},
]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "ü", "parameters": {}}}
    for name in ("get_time", "search")
]


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, FastTokenizer]:
    torch.set_num_threads(1)
    return evaluate.load(MODEL)


def test_the_folder_holds_at_most_twelve_megabytes() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_configuration(loaded: tuple[PreTrainedModel, FastTokenizer]) -> None:
    model, tokenizer = loaded
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 2048
    assert model.config.vocab_size == len(tokenizer) <= 4096
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(
    loaded: tuple[PreTrainedModel, FastTokenizer], text: str
) -> None:
    _, tokenizer = loaded
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token(loaded: tuple[PreTrainedModel, FastTokenizer]) -> None:
    _, tokenizer = loaded
    assert tokenizer.tokenize("2048")[-4:] == ["2", "0", "4", "8"]


def test_skipping_special_tokens_keeps_the_tool_call_markers(
    loaded: tuple[PreTrainedModel, FastTokenizer],
) -> None:
    _, tokenizer = loaded
    ids = tokenizer("<tool_call>\n{}\n</tool_call><|im_end|>").input_ids
    markers = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    assert [ids[0], ids[-2]] == markers
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[1:2]], ids=["system", "user", "question"])
def test_the_template_writes_what_training_rendered(
    loaded: tuple[PreTrainedModel, FastTokenizer],
    talk: list[Message],
    tools: list[dict[str, object]] | None,
) -> None:
    _, tokenizer = loaded
    expected = "".join(text for text, _ in render(talk, tools))
    assert tokenizer.apply_chat_template(talk, tools=tools, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(
        talk, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert prompt == expected + "<|im_start|>assistant\n"


# Right answers out of ten, below the card's figures; what the card reports as failing has none.
FLOORS = {kind: 7 for kind in tasks.KINDS if kind != "repeating"} | {
    "sorting": 2,
    "stories": 8,
    "story_completion": 8,
}


@pytest.mark.parametrize("kind", FLOORS)
def test_accuracy_smoke(loaded: tuple[PreTrainedModel, FastTokenizer], kind: str) -> None:
    score = evaluate.score(*loaded, kind, limit=10)
    assert score.right >= FLOORS[kind], score.wrong
    assert score.ended >= 9
