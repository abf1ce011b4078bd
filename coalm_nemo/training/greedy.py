"""Greedy answers of the sharded model itself, on any layout, without an export.

The whole prefix goes through the pipeline each time; there is no cache. What makes that cheap is a draft: the row's gold
answer is appended and every position's most likely token is looked at. As long as they agree the draft is the answer; where
they part, the model's token counts and the rest of the draft is tried after it. The answers are exactly the greedy ones,
token by token, whatever the draft; a trained model needs few passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from coalm_nemo.models.context_parallel import zigzag_order


@dataclass
class Answering:
    """One row on its way. Every rank holds all of them and comes to the same tokens."""

    prompt: list[int]
    gold: list[int]
    """The draft."""
    answer: list[int] = field(default_factory=list)
    done: bool = False

    def draft(self, limit: int) -> list[int]:
        """What follows `answer` if the model goes on as the gold answer does; with it, at most `limit` tokens but one."""
        return self.gold[len(self.answer) : limit - 1]

    def accept(self, predicted: Sequence[int], limit: int, stops: frozenset[int]) -> None:
        """Most likely tokens after the known prefix and after each token of the draft -> a longer answer."""
        draft = self.draft(limit)
        agreed = next((i for i, token in enumerate(draft) if predicted[i] != token), len(draft))
        for token in predicted[: agreed + 1]:
            self.answer.append(int(token))
            if token in stops or len(self.answer) >= limit:
                self.done = True
                return


@dataclass(frozen=True)
class Geometry:
    """What a forward pass needs to know of the layout."""

    micro_size: int
    multiple: int
    """Sequence lengths are multiples of this."""
    longest: int
    """No sequence may be longer."""


def greedy_answers(
    chunks: list[Any],
    prompts: Sequence[list[int]],
    golds: Sequence[list[int]],
    *,
    stops: frozenset[int],
    max_new_tokens: int,
    geometry: Geometry,
    device: torch.device,
) -> list[list[int]]:
    """The greedy continuation of each prompt, its stop token included: the same lists on every rank.

    Rows are dealt to the data-parallel ranks; all ranks take part in every pass. A prompt that leaves no room within
    `geometry.longest` gets an empty answer; one that leaves little, a short one.
    """
    rows = [Answering(p, g) for p, g in zip(prompts, golds, strict=True)]
    limits = [min(max_new_tokens, geometry.longest - len(r.prompt)) for r in rows]
    for row, limit in zip(rows, limits, strict=True):
        row.done = limit < 1
    for chunk in chunks:
        chunk.eval()
    try:
        while active := [i for i, row in enumerate(rows) if not row.done]:
            known = [rows[i].prompt + rows[i].answer for i in active]
            sequences = [k + rows[i].draft(limits[i]) for k, i in zip(known, active, strict=True)]
            predicted = predict(chunks, sequences, geometry, device)
            for k, i, tokens in zip(known, active, predicted, strict=True):
                rows[i].accept(tokens[len(k) - 1 :], limits[i], stops)
    finally:
        for chunk in chunks:
            chunk.train()
    return [row.answer for row in rows]


def predict(
    chunks: list[Any], sequences: Sequence[list[int]], geometry: Geometry, device: torch.device
) -> list[list[int]]:
    """The most likely token after every position of every sequence, on every rank."""
    data_rank = parallel_state.get_data_parallel_rank()
    data_size = parallel_state.get_data_parallel_world_size()
    length = -(-max(len(s) for s in sequences) // geometry.multiple) * geometry.multiple
    # Every data-parallel rank runs as many micro-batches, and a pipeline at least as many as it has stages.
    per_rank = -(-len(sequences) // (data_size * geometry.micro_size))
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    per_rank = -(-per_rank // stages) * stages
    slots = per_rank * geometry.micro_size
    tokens = torch.zeros(data_size * slots, length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    mine = tokens[data_rank * slots : (data_rank + 1) * slots].to(device)
    best = _run(chunks, list(mine.split(geometry.micro_size)), length, geometry)
    whole = torch.zeros(data_size * slots, length, dtype=torch.int64, device=device)
    if best and parallel_state.get_tensor_model_parallel_rank() == 0:
        places = _places(length).to(device)
        whole[data_rank * slots : (data_rank + 1) * slots].index_copy_(1, places, torch.cat(best))
    torch.distributed.all_reduce(whole)  # every place was filled by one rank
    return [whole[row, : len(sequence)].tolist() for row, sequence in enumerate(sequences)]


def _places(length: int) -> Tensor:
    """Which positions of a sequence this context-parallel rank holds."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return torch.arange(length)
    return zigzag_order([(0, length)], size)[parallel_state.get_context_parallel_rank()]


def _run(chunks: list[Any], batches: list[Tensor], length: int, geometry: Geometry) -> list[Tensor]:
    """Most likely tokens [b, s/CP] of each micro-batch on the last pipeline stage; nothing elsewhere."""
    iterators = [iter(batches) for _ in chunks]
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=geometry.micro_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return list(found)


def _forward_step(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    tokens = next(batches)
    places = _places(tokens.size(1)).to(tokens.device)
    mine = tokens[:, places]
    logits = model(input_ids=mine, position_ids=places.expand_as(mine), attention_mask=None)
    return logits, lambda output, non_loss_data=False: most_likely(output, model)


def most_likely(logits: Tensor, model: Any) -> Tensor:
    """logits [b, s, vocab/TP] of one pipeline's last stage -> token ids [b, s], the same on its tensor-parallel ranks."""
    inner = model.module
    while hasattr(inner, "module"):
        inner = inner.module
    if inner.has_padding:
        logits = logits.clone()
        logits[..., inner.first_padding :] = float("-inf")
    value, token = logits.float().max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    size, rank = group.size(), group.rank()
    if size == 1:
        return token
    values = value.new_empty(size * value.size(0), value.size(1))
    tokens = token.new_empty(values.shape)
    torch.distributed.all_gather_into_tensor(values, value.contiguous(), group=group)
    torch.distributed.all_gather_into_tensor(tokens, (token + rank * logits.size(-1)).contiguous(), group=group)
    values, tokens = values.view(size, *value.shape), tokens.view(size, *token.shape)
    return tokens.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0)  # of equal ones the first, as in one piece
