"""Feed the call parser mutated real calls and random text; report crashes, anything it ran, and the slowest string.

    python -m benchmarks.fuzz_calls --strings 100000 --seed 0

Each string is parsed under an audit hook that sees every compile, exec, import, open, subprocess and socket of the
interpreter. Exit code 1 if a string raised, ran something, or took longer than --limit-s.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from coalm_nemo.evaluation.calls import parse_calls, parse_state

FORBIDDEN_EVENTS = frozenset(
    {
        "compile",
        "exec",
        "import",
        "open",
        "os.system",
        "subprocess.Popen",
        "socket.connect",
        "ctypes.dlopen",
        "os.remove",
    }
)
REAL = (
    "[find_trains(departure='Ely', day='friday', people=2), book(ref='A1')]",
    '[{"name": "GetWeather", "arguments": {"city": "Oslo", "days": [1, 2], "unit": null}}]',
    '{"name": "area.circle", "parameters": {"radius": 2.5, "exact": true}}',
    '```json\n[{"name": "f", "arguments": {"nested": {"a": [{"b": "c"}]}}}]\n```',
    "Thought: The user wants a table.\nAction: BookTable(name='Bell', time='19:30', people=4)\nObservation: {}",
    '<tool_call>\n{"name": "f", "arguments": {"a": "\\u00e9 \\n \\"q\\""}}\n</tool_call>',
    '<|python_tag|>{"name": "f", "parameters": {"a": -1e-3}}<|eom_id|>',
    'System: {"domain": "tables", "slot_values": {"city": "Oslo", "people": 4}}',
    "Sure, I can help: [__import__('os').system(command='true'), exec(code='1')]",
    "f(a=(1, 2), b={'x': {'y': 'it\\'s'}}, c=[[], [[]]], d=True)",
)
_PIECES = tuple("[](){}'\"=,:;\\`<>|*+-.0 9\n\t_#@é😀\0") + (
    "```", "Action:", "<tool_call>", "</tool_call>", "<|python_tag|>", "lambda: ", "__import__('os')", "\\u12", "\\x", "1e9",
    "eval(", "True", "null", "name", "arguments", "f(", "a=", "[" * 50, "(" * 50, '{"a":' * 40, "9" * 300, "\\" * 30,
)  # fmt: skip

_events: list[str] | None = None
_installed = False


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _events is not None and event in FORBIDDEN_EVENTS:
        _events.append(event)


@contextmanager
def audited() -> Iterator[list[str]]:
    """What the interpreter compiles, runs, imports or opens within the block. The hook stays, it cannot be removed."""
    global _events, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _events = events = []
    try:
        yield events
    finally:
        _events = None


def mutate(text: str, seed: int) -> str:
    """Up to eight insertions, deletions, swaps, repeats and cuts."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 8)):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:i] + rng.choice(_PIECES) + text[i:]
        elif kind == 1:
            text = text[:i] + text[i + rng.randint(1, 3) :]
        elif kind == 2:
            text = text[:i] + text[i:j] * rng.randint(2, 6) + text[j:]
        elif kind == 3:
            text = text[:j] + rng.choice(REAL)[rng.randint(0, 20) :] + text[j:]
        else:
            text = text[: max(j, 5)]
        text = text[:40_000]
    return text


def random_text(seed: int) -> str:
    """Pieces of syntax in no order, or characters of the whole of Unicode."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return "".join(rng.choice(_PIECES) for _ in range(rng.randint(0, 60)))
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randint(0, 200)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1.0)
    arguments = parser.parse_args()
    verdicts: Counter[str] = Counter()
    slowest, longest, total = 0.0, 0, time.process_time()
    for number in range(arguments.strings):
        seed = arguments.seed * 2**32 + number
        text = mutate(REAL[number % len(REAL)], seed) if number % 3 else random_text(seed)
        with audited() as events:
            began = time.process_time()
            parsed = parse_calls(text)  # a crash ends the script with its traceback
            parse_state(text)
            seconds = time.process_time() - began
        if events or seconds > arguments.limit_s:
            print(f"string {number}: {events or f'{seconds:.2f} s'}: {text[:200]!r}")
            return 1
        slowest, longest = max(slowest, seconds), max(longest, len(text))
        verdicts[parsed.form or parsed.fault or "no call"] += 1
    total = time.process_time() - total
    print(
        f"{arguments.strings} strings in {total:.1f} s of CPU time, up to {longest} characters: no crash, nothing run"
    )
    print(f"slowest {slowest * 1e3:.1f} ms; " + ", ".join(f"{k} {v}" for k, v in verdicts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
