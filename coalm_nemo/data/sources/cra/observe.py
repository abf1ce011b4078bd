"""Service results as an observation: one line of JSON with the real records, cut to those that matter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from coalm_nemo.data.sources.cra.dialogue import Act

MAX_RECORDS = 3
"""Records shown when fewer are spoken of. A service returns up to ten, 250 characters each."""

Record = Mapping[str, str]
_SPOKEN_OF = ("OFFER", "INFORM")


def observation(records: Sequence[Record], total: int, status: str) -> str:
    """`total` counts all results, shown or not. `status` is the annotated outcome of a transaction, where it has one:
    a booking that failed may return the nearest alternative, which without it looks like a success."""
    outcome = {"status": status} if status else {}
    return json.dumps({**outcome, "total": total, "results": list(records)}, ensure_ascii=False)


def status_of(acts: Iterable[Act]) -> str:
    """NOTIFY_SUCCESS and NOTIFY_FAILURE are the only places where SGD says how a transaction ended."""
    names = {act.act for act in acts}
    return "success" if "NOTIFY_SUCCESS" in names else "failure" if "NOTIFY_FAILURE" in names else ""


def spoken_of(results: Sequence[Record], turns: Iterable[Sequence[Act]]) -> list[Record]:
    """The records that the system's `turns` up to the next call speak of, in the order they come up.

    Later turns count too: "is there another one?" is answered from the results of the call before it.
    """
    chosen: list[int] = []
    for acts in turns:
        chosen += [number for number in _offered(results, acts) if number not in chosen]
        chosen += _holding(results, acts, chosen)
    return [results[number] for number in chosen]


def with_others(results: Sequence[Record], first: Sequence[Record]) -> list[Record]:
    """`first`, filled up with the service's next best records."""
    rest = (record for record in results if not any(record is shown for shown in first))
    return [*first, *rest][: max(MAX_RECORDS, len(first))]


def _offered(results: Sequence[Record], acts: Sequence[Act]) -> list[int]:
    """Records that agree with every offered slot; several values of one slot offer several records, one for each."""
    offers = [act for act in acts if act.act == "OFFER" and act.canonical]
    if not offers:
        return []
    found: dict[tuple[str, ...], int] = {}
    for number, record in enumerate(results):
        if all(record.get(act.slot) in act.canonical for act in offers):
            found.setdefault(tuple(record[act.slot] for act in offers), number)
    return list(found.values())


def _holding(results: Sequence[Record], acts: Sequence[Act], chosen: Sequence[int]) -> list[int]:
    """For every value said that no chosen record holds, the first record that does."""
    found: list[int] = []
    for act in acts:
        for value in act.canonical if act.act in _SPOKEN_OF else ():
            if any(results[number].get(act.slot) == value for number in [*chosen, *found]):
                continue
            found += [n for n, record in enumerate(results) if record.get(act.slot) == value][:1]
    return found


def differences(parameters: Mapping[str, str], results: Sequence[Record]) -> dict[str, str]:
    """Slot -> value of the first result where it is not the value that was asked for."""
    first = results[0] if results else {}
    return {slot: first[slot] for slot, value in parameters.items() if slot in first and first[slot] != value}
