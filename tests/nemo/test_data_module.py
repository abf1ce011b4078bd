"""NeMo's batches are ours: the same tensors in the same order on every rank, and after a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from tests.conftest import write_rows
from tests.nemo.needs import NEEDS_NEMO

pytestmark = NEEDS_NEMO
LENGTH = 96


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows as a built set and as they are."""
    from coalm_nemo.data.build import build
    from coalm_nemo.data.build_config import load_build_config

    directory = tmp_path_factory.mktemp("nemo")
    file = write_rows(directory / "rows.jsonl", 50)
    config = load_build_config(None, [f"chat={file}"], [], tokenizer=str(tiny_llama), seq_len_tokens=LENGTH)
    return {"set": build(config, directory / "set", workers=1).directory, "file": file}


def module(tiny: Path, train: Path, tmp_path: Path, *, steps: int, step: int = 0, **more: Any) -> Any:
    """The data module as NeMo's trainer holds it at `step`."""
    from recipes.nemo.data_module import RowsDataModule

    made = RowsDataModule(
        train=str(train),
        hf_path=str(tiny),
        seq_length=LENGTH,
        cache_dir=str(tmp_path),
        num_workers=0,
        overlong="drop",
        **more,
    )
    made.trainer = SimpleNamespace(max_steps=steps, global_step=step)  # type: ignore[assignment]
    made.prepare_data()
    made.setup("fit")
    return made


def dealt(made: Any, loader: Any, rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Steps of micro-batches, as NeMo's strategy and its step take them from the loader."""
    from megatron.core import parallel_state
    from nemo.utils.megatron_utils import get_iterator_k_split

    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: size)
    count = made.global_batch_size // (made.micro_batch_size * size)
    ours = made.data_sampler.transform_dataloader(loader)
    steps = [list(get_iterator_k_split(batch, count)) for batch in ours]
    assert len(steps) == len(ours)
    return steps


def feed(made: Any, rank: int, size: int) -> Any:
    """`coalm train`'s own feed over the same rows."""
    from coalm_nemo.training.feed import Feed

    run: RunConfig = made.run
    return Feed(
        made.train_feed.rows, run, made.train_feed.shape, shuffle=run.data.shuffle, data_rank=rank, data_size=size
    )


def same(theirs: dict[str, Any], ours: Any) -> None:
    import torch
    from nemo.collections.llm.gpt.model.base import get_packed_seq_params

    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(theirs[name], getattr(ours, name)), name
    assert ("cu_seqlens" in theirs) == (ours.packed_seq_params is not None)
    if ours.packed_seq_params is not None:
        packed = get_packed_seq_params(theirs)
        assert packed.qkv_format == "thd" and packed.cu_seqlens_q.dtype == torch.int32
        assert torch.equal(packed.cu_seqlens_q, ours.packed_seq_params.cu_seqlens_q)
        assert int(packed.max_seqlen_q) == ours.packed_seq_params.max_seqlen_q


@pytest.mark.parametrize("kind", ["set", "file"])
@pytest.mark.parametrize(("packing", "micro"), [(True, 1), (False, 1), (False, 2)])
@pytest.mark.parametrize("size", [1, 2])
def test_batches_equal_the_feeds(
    tiny_llama: Path, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, packing: bool, micro: int, size: int,
) -> None:  # fmt: skip
    """Over two epochs, to the last, partly filled batch."""
    import torch

    from coalm_nemo.training.feed import total_steps

    more = {"global_batch_size": 8, "micro_batch_size": micro, "packing": packing, "epochs": 2.0, "length_multiple": 16}
    made = module(tiny_llama, rows[kind], tmp_path, steps=1, **more)
    made.run.train.epochs = 2.0
    steps, end = total_steps(made.run, len(made.train_feed.items))
    made.trainer.max_steps = steps
    for rank in range(size):
        own = feed(made, rank, size)
        got = dealt(made, made.train_dataloader(), rank, size, monkeypatch)
        assert len(got) == steps
        for step, micro_batches in enumerate(got):
            expected = own.micro_batches(own.global_batch(step * 8, end), torch.device("cpu"))
            assert len(micro_batches) == len(expected)
            for theirs, ours in zip(micro_batches, expected, strict=True):
                same(theirs, ours)


def test_a_resume_goes_on_with_the_next_batch(
    tiny_llama: Path, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import num_microbatches_calculator

    monkeypatch.setattr(num_microbatches_calculator, "update_num_microbatches", lambda **kwargs: None)
    more = {"global_batch_size": 4, "packing": True}
    whole = module(tiny_llama, rows["set"], tmp_path, steps=6, **more)
    uninterrupted = dealt(whole, whole.train_dataloader(), 0, 1, monkeypatch)
    monkeypatch.setattr(whole.data_sampler, "compute_consumed_samples", lambda steps: 4 * steps)
    whole.trainer.global_step = 2
    state = whole.state_dict()
    again = module(tiny_llama, rows["set"], tmp_path, steps=6, step=2, **more)
    again.load_state_dict(state)
    rest = dealt(again, again.train_dataloader(), 0, 1, monkeypatch)
    assert len(rest) == 4
    for ours, theirs in zip(rest, uninterrupted[2:], strict=True):
        assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(ours, theirs, strict=True))
    other = module(tiny_llama, rows["set"], tmp_path, steps=6, seed=7, **more)
    with pytest.raises(UserError, match="other rows"):
        other.load_state_dict(state)


def test_validation_rows_come_once_in_order(
    tiny_llama: Path, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(
        tiny_llama, rows["set"], tmp_path, steps=1, global_batch_size=4, packing=False, validation_fraction=0.3
    )
    got = dealt(made, made.val_dataloader(), 0, 1, monkeypatch)
    supervised = sum(int(micro["loss_mask"].sum()) for step in got for micro in step)
    assert made.validation_feed is not None
    assert supervised == int(made.validation_feed.rows.supervised().sum())


def test_nemos_loss_counts_our_mask(tiny_llama: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    """A sum over the supervised tokens, and how many they are."""
    import torch
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    made = module(tiny_llama, rows["set"], tmp_path, steps=1, global_batch_size=2, packing=True)
    batch = made.train_dataloader().collate_fn([0, 1])
    losses = torch.rand(batch["loss_mask"].shape)
    reduction = MaskedTokenLossReduction()
    reduction.setup(batch)
    total, tokens, _ = reduction(losses)
    rows_of_step = made.train_feed.global_batch(0, None).supervised_tokens
    assert int(tokens) == rows_of_step > 0
    assert float(total) == pytest.approx(float(losses[batch["loss_mask"] > 0].sum()), rel=1e-6)
