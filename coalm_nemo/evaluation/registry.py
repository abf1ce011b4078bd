"""Which benchmarks there are. Each is a module that is imported when it is asked for.

The module has `load(options: EvalOptions) -> Benchmark`; or, where another program does the asking and scoring,
`run(options: EvalOptions, source: ModelSource) -> int`, whose result is the exit code and which writes scores.json itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    from coalm_nemo.evaluation.base import Benchmark
    from coalm_nemo.evaluation.model_source import ModelSource
    from coalm_nemo.evaluation.options import EvalOptions

    Load = Callable[[EvalOptions], Benchmark]
    Run = Callable[[EvalOptions, ModelSource], int]

BENCHMARKS = {
    "multiwoz": "coalm_nemo.evaluation.multiwoz.benchmark",
    "sgd": "coalm_nemo.evaluation.sgd.benchmark",
    "api-bank": "coalm_nemo.evaluation.apibank.benchmark",
    "bfcl": "coalm_nemo.evaluation.bfcl.benchmark",
    "lm": "coalm_nemo.evaluation.lm.benchmark",
    "demo": "coalm_nemo.demo.benchmark",
}


def find_benchmark(name: str) -> tuple[Load | None, Run | None]:
    """(load, run) of a benchmark, one of them None. Raises UserError where there is no such benchmark."""
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    module = import_module(BENCHMARKS[name])
    return getattr(module, "load", None), getattr(module, "run", None)
