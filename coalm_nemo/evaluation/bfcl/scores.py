"""BFCL's overall scores from its categories, as the package's leaderboard adds them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coalm_nemo.evaluation.base import Verdict

PYTHON, JAVA, JAVASCRIPT = "simple", "java", "javascript"
MULTI_TURN = tuple(f"multi_turn_{kind}" for kind in ("base", "miss_func", "miss_param", "long_context"))
LIVE = tuple(f"live_{k}" for k in ("simple", "multiple", "parallel", "parallel_multiple", "irrelevance", "relevance"))
OTHER_NON_LIVE = ("multiple", "parallel", "parallel_multiple", "irrelevance")


def category_counts(verdicts: Sequence[Verdict]) -> dict[str, tuple[float, float]]:
    """Category -> (right, asked). V4's `simple_java` is V3's `java`."""
    counts: dict[str, tuple[float, float]] = {}
    for verdict in verdicts:
        for name, (right, of) in verdict.counts.items():
            name = {"simple_python": PYTHON, "simple_java": JAVA, "simple_javascript": JAVASCRIPT}.get(name, name)
            before = counts.get(name, (0.0, 0.0))
            counts[name] = before[0] + right, before[1] + of
    return counts


def overall_scores(verdicts: Sequence[Verdict], release: str) -> dict[str, float]:
    """Percent; a mean is given only where every category that it is made of was asked."""
    counts = category_counts(verdicts)
    accuracy = {name: 100 * right / of for name, (right, of) in counts.items() if of}
    scores: dict[str, float] = {}
    if simple := _mean(accuracy, (PYTHON, JAVA, JAVASCRIPT)):
        scores |= {"simple_ast": simple[0]}
    if non_live := _mean(accuracy | scores, ("simple_ast", *OTHER_NON_LIVE)):
        scores["non_live"] = non_live[0]
    if all(name in accuracy for name in LIVE):
        scores["live"] = 100 * sum(counts[n][0] for n in LIVE) / sum(counts[n][1] for n in LIVE)
    if multi_turn := _mean(accuracy, MULTI_TURN):
        scores["multi_turn"] = multi_turn[0]
    if release == "v3" and (overall := _mean(scores, ("non_live", "live", "multi_turn"))):
        scores["overall"] = overall[0]
    return scores


def _mean(values: Mapping[str, float], names: Sequence[str]) -> tuple[float] | None:
    return (sum(values[n] for n in names) / len(names),) if all(n in values for n in names) else None
