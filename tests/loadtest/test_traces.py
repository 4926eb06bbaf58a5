"""Trace files of every format, and what may be changed about them."""

from __future__ import annotations

from pathlib import Path

import pytest

import loadtest
from loadtest.conversations import Common, replayed
from loadtest.traces import TraceRequest, adapted, clipped, load_trace

DATA = Path(loadtest.__file__).parent / "data"

BURSTGPT = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472,18,490,Conversation log
45,b,0.2,GPT-4,1087,230,1317,API log
46,b,0.0,GPT-4,300,0,300,API log
"""
BAILIAN = """\
{"chat_id":1,"parent_chat_id":-1,"timestamp":61.5,"input_length":40,"output_length":7,"type":"text","turn":1,"hash_ids":[9,8,7]}
{"chat_id":2,"parent_chat_id":1,"timestamp":61.0,"input_length":20,"output_length":3,"type":"search","turn":2,"hash_ids":[9,5]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azure() -> None:
    trace = load_trace(DATA / "azure-conv-2023.csv")
    assert len(trace) == 300
    assert (trace[0].offset, trace[0].input_tokens, trace[0].output_tokens) == (0.0, 374, 44)
    # 18:15:46.6805900 and 18:15:50.9951690
    assert trace[1].offset == pytest.approx(4.314579, abs=1e-6)
    assert len(load_trace(DATA / "azure-code-2023.csv")) == 200


def test_mooncake() -> None:
    trace = load_trace(DATA / "mooncake-synthetic.jsonl")
    assert len(trace) == 40
    assert trace[0].offset == 0 and 0 < trace[-1].offset < 60
    assert trace[0].block_tokens == 512
    assert all(-(-r.input_tokens // 512) == len(r.blocks) for r in trace)


def test_burstgpt_without_its_failures(tmp_path: Path) -> None:
    assert load_trace(written(tmp_path, BURSTGPT)) == [
        TraceRequest(0.0, 472, 18, "Conversation log"),
        TraceRequest(40.0, 1087, 230, "API log"),
    ]


def test_bailian_in_order_of_time(tmp_path: Path) -> None:
    assert load_trace(written(tmp_path, BAILIAN)) == [
        TraceRequest(0.0, 20, 3, "search", (9, 5), 16),
        TraceRequest(0.5, 40, 7, "text", (9, 8, 7), 16),
    ]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "{}\n", "{nonsense\n", BURSTGPT[:90] + "\n"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="trace"):
        load_trace(written(tmp_path, text))


TRACE = [TraceRequest(float(i), 100 + i, 10, blocks=(i, 7), block_tokens=64) for i in range(100)]


def test_a_window_begins_at_zero() -> None:
    part = adapted(TRACE, start=20, seconds=10)
    assert [r.offset for r in part] == [float(i) for i in range(10)]
    assert part[0].input_tokens == 120


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "unknown columns"),
        (b"a,b\n1,2\n", "unknown columns ['a', 'b']"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,x,4\n", "'x'"),
        (b'{"input_length": 5, "output_length": 5}\n', "a request has no 'timestamp'"),
        (b'{"input_length": 5,\n', "truncated"),
        (b"\xff\xfe\x00", "can't decode"),
    ],
)
def test_what_is_no_trace_is_said(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        load_trace(path)
    assert str(path) in str(refusal.value) and why in str(refusal.value)


def test_scales() -> None:
    assert [r.offset for r in adapted(TRACE, time_scale=0.5)][:3] == [0.0, 0.5, 1.0]
    small = adapted(TRACE, length_scale=0.25)[0]
    assert (small.input_tokens, small.output_tokens, small.block_tokens) == (25, 2, 16)
    with pytest.raises(ValueError, match="no request"):
        adapted(TRACE, start=1e6)


def test_a_higher_rate_copies_requests_but_not_their_prefixes() -> None:
    dense = adapted(TRACE, rate_scale=2.5, seed=3)
    assert len(dense) == pytest.approx(250, abs=30)
    assert max(r.offset for r in dense) < 101
    assert len({r.blocks[0] for r in dense}) == len(dense)
    assert len(adapted(TRACE, rate_scale=0.3, seed=3)) == pytest.approx(30, abs=15)
    assert dense == adapted(TRACE, rate_scale=2.5, seed=3)


def test_requests_are_cut_to_the_context() -> None:
    fitting, cut = clipped([TraceRequest(0, 50, 10), TraceRequest(0, 200, 500)], 100)
    assert [(r.input_tokens, r.output_tokens) for r in fitting] == [(50, 10), (50, 50)]
    assert cut == 1


@pytest.mark.parametrize("form", ["ids", "words"])
def test_equal_blocks_become_equal_text(form: str) -> None:
    trace = [
        TraceRequest(0, 40, 1, blocks=(1, 2, 3), block_tokens=16),
        TraceRequest(0, 40, 1, blocks=(1, 2, 4), block_tokens=16),
        TraceRequest(0, 36, 1),
        TraceRequest(0, 36, 1),
    ]
    turns = [c.turns[0] for c in replayed(Common("m"), trace, 0, 2000, form)]  # type: ignore[arg-type]
    prompts = [t.fields["prompt"] for t in turns]
    if form == "words":
        prompts = [p.split() for p in prompts]
    assert [len(p) for p in prompts] == [40, 40, 36, 36]
    assert prompts[0][:32] == prompts[1][:32]
    assert prompts[0][32:] != prompts[1][32:]
    assert prompts[2] != prompts[3]
