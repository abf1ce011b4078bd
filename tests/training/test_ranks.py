"""Who this process is, from torchrun's or SLURM's variables, and how the ranks first meet."""

from __future__ import annotations

import os
import threading

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.training.ranks import (
    Ranks,
    export_rendezvous,
    first_rank_does,
    first_slurm_host,
    free_port,
    meet,
    ranks_from_environment,
    slurm_port,
)

NAMES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set here, by the test or by the code, is gone afterwards."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


SLURM = {
    "SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": 1234, "SLURM_STEP_ID": 2,
}  # fmt: skip


def test_alone() -> None:
    assert ranks_from_environment() == Ranks(0, 0, 1, "single")
    assert ranks_from_environment().first


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, RANK=9, LOCAL_RANK=1, WORLD_SIZE=16)
    assert ranks_from_environment() == Ranks(9, 1, 16, "torchrun")


def test_torchrun_inside_slurm_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **SLURM, RANK=3, LOCAL_RANK=3, WORLD_SIZE=4)
    assert ranks_from_environment() == Ranks(3, 3, 4, "torchrun")


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **SLURM)
    ranks = ranks_from_environment()
    assert ranks == Ranks(5, 1, 8, "slurm") and not ranks.first
    export_rendezvous(ranks)
    wanted = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(slurm_port("1234", "2")),
    }
    assert {k: os.environ[k] for k in wanted} == wanted


def test_a_batch_script_or_shell_is_single(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **SLURM | {"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1})
    assert ranks_from_environment().source == "single"
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert ranks_from_environment().source == "single"


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1.0"])
def test_variables_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_all(monkeypatch, **{"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2} | {name: value})
    with pytest.raises(UserError, match=f"{name}='{value}' is no number"):
        ranks_from_environment()


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("a1,b[2-3]", "a1"),
        ("node-a,node-b", "node-a"),
        ("gpu[001-004]-ib", "gpu001-ib"),
        ("gpu[1-2]-ib,x", "gpu1-ib"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_slurm_host(nodelist) == host


def test_no_node_list() -> None:
    with pytest.raises(UserError, match="start the ranks with srun"):
        first_slurm_host("")


def test_ports_of_steps() -> None:
    assert slurm_port("77", "0") == slurm_port("77", "0")
    ports = {slurm_port(str(job), str(step)) for job in range(1000, 1010) for step in range(5)}
    assert len(ports) == 50 and all(20000 <= p < 32000 for p in ports)


def test_torchrun_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, RANK=0, WORLD_SIZE=2)
    with pytest.raises(UserError, match="start the run with torchrun"):
        export_rendezvous(ranks_from_environment())


def test_alone_there_is_a_store_too() -> None:
    ranks = ranks_from_environment()
    store = meet(ranks, timeout_s=20)
    assert first_rank_does(store, ranks, "work", lambda: "done: with a colon") == "done: with a colon"
    with pytest.raises(UserError, match="^bad: rows$"):
        first_rank_does(store, ranks, "refuse", refuse)


def refuse() -> str:
    raise UserError("bad: rows")


def crash() -> str:
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("work", "kind", "sentence"),
    [(refuse, UserError, "bad: rows"), (crash, RuntimeError, "rank 0 failed: ZeroDivision")],
)
def test_a_failure_of_the_first_rank_is_everybodys(work: object, kind: type[Exception], sentence: str) -> None:
    from datetime import timedelta

    from torch.distributed import TCPStore

    port = free_port()
    first = TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=20), wait_for_workers=False)
    other = TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=20))
    raised: list[BaseException] = []

    def waiting() -> None:
        try:
            first_rank_does(other, Ranks(1, 1, 2, "torchrun"), "x", lambda: "never")
        except Exception as e:
            raised.append(e)

    thread = threading.Thread(target=waiting)
    thread.start()
    with pytest.raises((UserError, ZeroDivisionError)):
        first_rank_does(first, Ranks(0, 0, 2, "torchrun"), "x", work)  # type: ignore[arg-type]
    thread.join(20)
    assert isinstance(raised[0], kind) and str(raised[0]).startswith(sentence)
