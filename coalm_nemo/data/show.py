"""`coalm data show`: rows as the model sees them, targets in colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from coalm_nemo.data.shards import ShardSet
from coalm_nemo.errors import UserError


def show_command(directory: Path, count: int, seed: int, source: str | None, packs: bool, as_json: bool) -> None:
    """Print `count` random rows, or packs. Raises UserError where there is no such set or source."""
    from coalm_nemo.data.chat import load_tokenizer

    rows = ShardSet.load(directory)
    tokenizer = load_tokenizer(directory / "tokenizer")
    if packs:
        _print_packs(rows, tokenizer, count, seed)
        return
    drawn = [describe_row(rows, index, tokenizer) for index in draw_rows(rows, count, seed, source)]
    if as_json:
        print(json.dumps(drawn, ensure_ascii=False))
        return
    for row in drawn:
        _print_row(row, tokenizer)


def draw_rows(rows: ShardSet, count: int, seed: int, source: str | None) -> list[int]:
    """`count` different rows at random (all, if there are no more), of one source if it is named."""
    candidates = np.arange(len(rows))
    if source is not None:
        if source not in rows.source_names():
            raise UserError(f"the set has no source '{source}'; there are {', '.join(rows.source_names())}")
        candidates = np.flatnonzero(rows.sources() == rows.source_names().index(source))
    generator = np.random.Generator(np.random.PCG64(seed))
    return sorted(generator.permutation(candidates)[:count].tolist())


def describe_row(rows: ShardSet, index: int, tokenizer: Any) -> dict[str, Any]:
    """One row, unpacked. `target_text` is what is supervised, end-of-turn tokens included."""
    tokens, mask = rows.row(index)
    decode = tokenizer.decode
    return {
        "source": rows.source_names()[int(rows.sources()[index])],
        "row_id": rows.row_id(index),
        "prompt_text": decode(tokens[mask == 0].tolist(), skip_special_tokens=False),
        "target_text": decode(tokens[mask == 1].tolist(), skip_special_tokens=False),
        "token_ids": tokens.tolist(),
        "loss_mask": mask.tolist(),
    }


def _print_row(row: dict[str, Any], tokenizer: Any) -> None:
    from rich.console import Console
    from rich.rule import Rule

    console = Console(highlight=False)
    supervised = sum(row["loss_mask"])
    console.print(Rule(f"{row['source']} · {row['row_id']} · {len(row['token_ids'])} tokens, {supervised} targets"))
    console.print(_coloured(np.array(row["token_ids"]), np.array(row["loss_mask"]), tokenizer))


def _coloured(tokens: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Any:
    """What is read in grey, what is learnt in green."""
    from rich.text import Text

    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        style = "bold green" if mask[a] else "bright_black"
        text.append(tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False), style)
    return text


def _print_packs(rows: ShardSet, tokenizer: Any, count: int, seed: int) -> None:
    from rich.console import Console
    from rich.rule import Rule

    packing = rows.manifest["packing"]
    packs = rows.packs(packing["seq_len_tokens"], packing["multiple"])
    assert packs is not None
    console = Console(highlight=False)
    positions = rows.positions()
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(packs))
    for number in sorted(order[:count].tolist()):
        members, start = packs.pack(number), 0
        held = int(positions[members].sum())
        console.print(
            Rule(f"pack {number} · {len(members)} rows, {held} of {packing['seq_len_tokens']} tokens", style="yellow")
        )
        for member in members:
            tokens, mask = rows.row(member)
            console.print(
                f"── {rows.row_id(member)} · from {start} to {start + int(positions[member])}", style="yellow"
            )
            console.print(_coloured(tokens, mask, tokenizer))
            start += -(-int(positions[member]) // packing["multiple"]) * packing["multiple"]
