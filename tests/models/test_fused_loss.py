"""megatron-core's fused cross entropy is the plain one, with a padded vocabulary too. Run without its compiler, on CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig


def compare(run: RunConfig) -> int:
    """Loss and gradient of both kernels on this rank; writes their largest differences."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    from coalm_nemo.platform import choose_platform
    from coalm_nemo.training.ranks import meet, ranks_from_environment
    from coalm_nemo.training.setup import start_process_groups

    torch.compiler.set_stance("force_eager")
    ranks = ranks_from_environment()
    start_process_groups(run, choose_platform("cpu"), ranks, meet(ranks, 60))
    group, vocabulary = parallel_state.get_tensor_model_parallel_group(), 40
    drawn = torch.randn(12, 2, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    drawn[..., 37:] = float("-inf")  # three entries of padding, on the last rank
    labels = torch.randint(0, 37, (12, 2), generator=torch.Generator().manual_seed(2))
    mine = drawn.chunk(group.size(), -1)[group.rank()].to(torch.bfloat16)
    found = []
    for kernel in (
        lambda x: fused_vocab_parallel_cross_entropy(x, labels, group),
        lambda x: tensor_parallel.vocab_parallel_cross_entropy(x, labels),
    ):
        logits = mine.clone().requires_grad_()
        loss = kernel(logits * 1)  # a copy: both kernels work in place
        loss.sum().backward()
        assert logits.grad is not None and torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
        found.append((loss.detach(), logits.grad.float()))
    (fused_loss, fused_grad), (loss, grad) = found
    gaps = [float((fused_loss - loss).abs().max()), float((fused_grad - grad).abs().max()), float(grad.abs().max())]
    Path(run.run.dir, f"gaps{ranks.rank}.json").write_text(json.dumps(gaps))
    return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_loss_is_the_plain_one(ranks: int, ranks_pool: Any, tmp_path: Path) -> None:
    run = RunConfig()
    run.run.dir, run.parallel.tensor = str(tmp_path / "run"), ranks
    (tmp_path / "run").mkdir()
    assert ranks_pool.train(run, ranks, worker=compare) == [0] * ranks
    for rank in range(ranks):
        loss_gap, grad_gap, largest = json.loads((tmp_path / "run" / f"gaps{rank}.json").read_text())
        assert loss_gap < 1e-5 and grad_gap <= 2**-8 * largest
        assert largest > 0.1
