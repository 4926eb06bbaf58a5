"""Which grammar library, and what ours costs: `python -m tests.bench.bench_grammar`.

Compares llguidance, xgrammar (where it is installed) and llguidance behind our rewriting of schemas
on the schemas of `tests/structured/corpus.py`: how many are kept by adversaries instead of a model,
the time to compile and to make a mask, and what becomes of explosive schemas. A schema that takes
more than 20 seconds or 6 GiB is counted as hung. Then measures steps of 16 sequences with and
without a grammar on the built-in model, in the worker and served (`--overhead` does only that).

`--tokenizer FOLDER` adds a model folder's tokenizer to the built-in one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from app.inputs.tokenizer import Tokenizer
from batching.core.types import Grammar, SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker.grammar import Grammars
from tests.e2e.server_process import ServerProcess, running
from tests.structured.corpus import EXPLOSIVE, corpus
from tests.structured.drive import Driver, Follower
from tests.structured.validity import fault

BUILTIN = str(resources.files("batching") / "builtin/model")
LIBRARIES = ("xgrammar", "llguidance", "ours")
SECONDS, BYTES = 20.0, 6 << 30
SCHEMAS = [*corpus(), *((f"explosive-{i}", schema) for i, schema in enumerate(EXPLOSIVE))]
Compile = Callable[[Any], Follower]


class Timed:
    """A matcher whose masks are timed."""

    def __init__(self, inner: Follower, seconds: list[float]) -> None:
        self._inner, self._seconds = inner, seconds

    def fill(self, row: np.ndarray) -> bool:
        began = time.perf_counter()
        filled = self._inner.fill(row)
        self._seconds.append(time.perf_counter() - began)
        return filled

    def accept(self, token: int) -> None:
        self._inner.accept(token)


def llguidance(folder: str, vocab: int, ends: tuple[int, ...], *, rewrite: bool) -> Compile:
    from app.structured.request import schema_grammar

    grammars = Grammars(folder, vocab, ends)
    grammars.load()

    def compiled(schema: Any) -> Follower:
        if rewrite:
            grammar = schema_grammar(schema, "schema")
        else:
            raw = {"x-guidance": {"whitespace_flexible": False}, **schema}
            grammar = Grammar(json.dumps({"grammars": [{"json_schema": raw}]}))
        if (wrong := grammars.fault(grammar)) is not None:
            raise ValueError(wrong)
        return grammars.matcher(SamplingParams(4000, grammar=grammar, stop_token_ids=ends))

    return compiled


class XgrammarMatcher:
    """xgrammar's matcher as a `Follower`."""

    def __init__(self, matcher: Any, words: int) -> None:
        import torch

        self._matcher = matcher
        self._bits = torch.zeros((1, words), dtype=torch.int32)

    def fill(self, row: np.ndarray) -> bool:
        if self._matcher.is_terminated():
            return False
        self._bits.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._bits)
        row[:] = self._bits[0].numpy()
        return bool(row.any())

    def accept(self, token: int) -> None:
        self._matcher.accept_token(token)


def xgrammar(folder: str, vocab: int, ends: tuple[int, ...]) -> Compile:
    import transformers
    import xgrammar  # type: ignore[import-not-found]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab, stop_token_ids=list(ends)
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compiled(schema: Any) -> Follower:
        grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        return XgrammarMatcher(xgrammar.GrammarMatcher(grammar), -(-vocab // 32))

    return compiled


def schemas_for(folder: str) -> list[tuple[str, Any]]:
    """All, or a fifth where a vocabulary is so large that the adversaries take long."""
    return SCHEMAS if model_vocabulary(folder)[0] < 50_000 else SCHEMAS[::5]


def child(library: str, folder: str, start: int) -> None:
    """Print one JSON line for each schema from `start` on."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    vocab, ends = model_vocabulary(folder)
    driver = Driver(Tokenizer.load(Path(folder)), Grammars(folder, vocab, ends), vocab, ends)
    if library == "xgrammar":
        compile_schema = xgrammar(folder, vocab, ends)
    else:
        compile_schema = llguidance(folder, vocab, ends, rewrite=library == "ours")
    print(flush=True)
    for name, schema in schemas_for(folder)[start:]:
        print(json.dumps(measure(driver, compile_schema, name, schema)), flush=True)


def measure(driver: Driver, compile_schema: Compile, name: str, schema: Any) -> dict[str, Any]:
    """One schema: what went wrong, if anything, and the times."""
    schema = {} if schema is True else schema
    masks: list[float] = []
    began = time.perf_counter()
    try:
        compile_schema(schema)
    except Exception as error:  # a library's refusal has any type
        seconds = time.perf_counter() - began
        return {"compile": seconds, "fault": f"refused: {str(error)[:80]}", "masks": []}
    seconds, wrong = time.perf_counter() - began, None
    if not name.startswith("explosive"):
        for adversary, logits in driver.adversaries(0).items():
            matcher = Timed(compile_schema(schema), masks)
            broken = fault(driver.generate(matcher, logits), schema)
            wrong = wrong or (broken and f"{adversary}: {broken[:80]}")
    return {"compile": seconds, "fault": wrong, "masks": masks}


def rows(library: str, folder: str) -> Iterator[dict[str, Any]]:
    """The child's lines; it is started again after a schema on which it hangs or dies."""
    done, total = 0, len(schemas_for(folder))
    while done < total:
        command = [sys.executable, "-m", __spec__.name if __spec__ else "", "--child"]
        command += [library, folder, str(done)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # loaded
        while done < total:
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline() if ready else ""
            done += 1
            yield json.loads(line) if line else {"compile": None, "fault": "hung", "masks": []}
            if not line:
                break
        process.kill()
        process.wait()


def model_vocabulary(folder: str) -> tuple[int, tuple[int, ...]]:
    """Logits and end tokens of a model folder."""
    config = json.loads((Path(folder) / "config.json").read_bytes())
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        config |= json.loads(generation.read_bytes())
    ends = config["eos_token_id"]
    return config["vocab_size"], tuple(ends) if isinstance(ends, list) else (ends,)


def compare(folder: str) -> None:
    """Print one table row per library."""
    schemas = schemas_for(folder)
    print(f"\n{Path(folder).name}: {model_vocabulary(folder)[0]} tokens, {len(schemas)} schemas")
    print("| library | kept | broken | refused | hung | compile ms p50/p99/max | mask µs "
          "mean/p99/max | explosive: worst compile s, hung |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for library in LIBRARIES:
        named = list(zip(schemas, rows(library, folder), strict=True))
        plain = [row for (name, _), row in named if not name.startswith("explosive")]
        explosive = [row for (name, _), row in named if name.startswith("explosive")]
        faults = [row["fault"] for row in plain]
        refused = sum(str(f).startswith("refused") for f in faults)
        hung = faults.count("hung")
        kept = faults.count(None)
        compiles = 1e3 * np.array([r["compile"] for r in plain if r["compile"] is not None])
        masks = 1e6 * np.array([m for row in plain for m in row["masks"]])
        worst = max(r["compile"] or 0.0 for r in explosive)
        print(f"| {library} | {kept}/{len(plain)} | {len(plain) - kept - refused - hung} "
              f"| {refused} | {hung} | {spread(compiles, 50, 99)} "
              f"| {masks.mean():.1f} / {spread(masks, 99)} "
              f"| {worst:.2f}, {sum(r['fault'] == 'hung' for r in explosive)} |")  # fmt: skip
        for (name, _), row in named:
            if row["fault"] and "-v" in sys.argv:
                print(f"    {library} {name}: {row['fault']}")


def spread(values: np.ndarray, *percentiles: int) -> str:
    parts = [*(np.percentile(values, p) for p in percentiles), values.max()]
    return " / ".join(f"{part:.1f}" for part in parts)


JSON = {"content-type": "application/json"}
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo")
ASK = (
    "<|im_start|>user\n{}, {}, works as a baker in Paris. Extract the name, age, job and city as "
    "JSON.<|im_end|>\n<|im_start|>assistant\n"
)


def person(**limits: Any) -> dict[str, Any]:
    """The schema of the answers, with limits of its strings."""
    keys = {name: {"type": "string", **limits} for name in ("name", "age", "job", "city")}
    keys["age"] = {"type": "integer"}
    return {"type": "object", "properties": keys, "required": list(keys)}


PERSON = person()


def questions(count: int, turn: int = 0) -> list[str]:
    """Others each turn, for some five hundred."""
    numbers = range(turn * count, turn * count + count)
    return [ASK.format(NAMES[i % len(NAMES)], 20 + i % 67) for i in numbers]


def overhead(sequences: int = 16, steps: int = 20, rounds: int = 40) -> None:
    """Decode steps of as many sequences with and without a grammar, in turns.

    The model was trained to answer the question in JSON; of random tokens it makes something else.
    """
    from app.structured.request import schema_grammar
    from batching.worker.protocol import WorkerConfig
    from batching.worker.torch_worker import TorchWorker

    worker = TorchWorker(WorkerConfig(BUILTIN, max_sequences=sequences, num_blocks=sequences * 4))
    tokenizer = Tokenizer.load(Path(BUILTIN))

    def asked(turn: int) -> list[list[int]]:
        texts = questions(sequences, turn)
        return [tokenizer.encode(text, add_special_tokens=False, limit=1000) for text in texts]

    def strange(turn: int) -> list[list[int]]:
        return [[300 + i] * 40 for i in range(sequences)]

    one, bounded = schema_grammar(PERSON, "schema"), schema_grammar(person(maxLength=40), "schema")
    many = schema_grammar({"type": "array", "items": PERSON, "minItems": 1000}, "schema")
    for what, prompts, grammar in (
        ("follows", asked, one),
        ("follows, all strings bounded", asked, bounded),
        ("differs", strange, many),
    ):
        for how, temperature in (("greedy", 0.0), ("sampled", 0.7)):
            pairs = [
                (
                    decode(worker, prompts(turn), None, temperature, steps),
                    decode(worker, prompts(turn), grammar, temperature, steps),
                )
                for turn in range(rounds)
            ]
            free, kept = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs) - 1
            print(f"the model {what}, {how}: {free:.3f} ms a step of {sequences}, "
                  f"{kept:.3f} ms with a grammar: {ratio:+.1%}")  # fmt: skip
    worker.close()


def decode(
    worker: Any, prompts: list[list[int]], grammar: Grammar | None, temperature: float, steps: int
) -> float:
    """Median seconds of a decode step, from the plan to the known tokens."""
    ends = worker.capabilities().eos_token_ids
    params = SamplingParams(
        4000, temperature=temperature, top_p=0.95, stop_token_ids=ends, grammar=grammar
    )
    inits, shares = [], []
    for i, prompt in enumerate(prompts):
        inits.append(SlotInit(i, str(i), prompt, len(prompt), params))
        blocks = tuple(range(i * 4, i * 4 + 4))
        shares.append(SequencePlan(i, 0, len(prompt), True, blocks))
    worker.wait(worker.submit(StepPlan(0, tuple(inits), tuple(shares))))
    times = []
    for step in range(steps):
        row = [SequencePlan(i, len(p) + step, 1, True) for i, p in enumerate(prompts)]
        began = time.perf_counter()
        worker.wait(worker.submit(StepPlan(1, (), tuple(row))))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def served(sequences: int = 16, rounds: int = 60) -> None:
    """Requests of as many prompts to the real server with and without a grammar, in turns.

    Compared are those whose texts are the same, so that they took as many steps.
    """
    server = ServerProcess(Path(tempfile.mkdtemp(), "log"))
    with running(server):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)

        def ask(turn: int, temperature: float, **fields: Any) -> tuple[float, list[str], float]:
            prompts = questions(sequences, turn)
            body = {"model": "slipstream-tiny", "prompt": prompts, "max_tokens": 60, "seed": 1}
            text = json.dumps({**body, "temperature": temperature, **fields})
            began = time.perf_counter()
            connection.request("POST", "/v1/completions", text, JSON)
            answer = json.loads(connection.getresponse().read())
            seconds = time.perf_counter() - began
            steps = answer["usage"]["completion_tokens"] / sequences
            return seconds, [choice["text"] for choice in answer["choices"]], steps

        for how, temperature in (("greedy", 0.0), ("sampled", 0.7)):
            pairs = []
            for turn in range(rounds):
                ask(turn, temperature)  # the prompts are in the prefix cache for both that follow
                free, texts, steps = ask(turn, temperature)
                kept, others, _ = ask(turn, temperature, guided_json=PERSON)
                if turn and texts == others:
                    pairs.append((free / steps, kept / steps))
            free, kept = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs) - 1
            print(f"served, {how}: {free:.3f} ms a step of {sequences}, {kept:.3f} ms with a "
                  f"grammar: {ratio:+.1%} ({len(pairs)} rounds)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("-v", action="store_true", help="print what was not kept")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    if not arguments.overhead:
        for folder in (BUILTIN, *arguments.tokenizer):
            compare(folder)
    overhead()
    served()


if __name__ == "__main__":
    main()
