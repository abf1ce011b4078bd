"""What a benchmark is told: where its files are, how much of it to run, and its own options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coalm_nemo.errors import UserError


@dataclass(frozen=True)
class EvalOptions:
    """Everything but the model. A benchmark reads `extra` with `choice`, `text`, `number` and `path`."""

    out: Path
    """Where scores.json and items.jsonl go; a benchmark may write files of its own beside them."""
    data: Path | None = None
    """The benchmark's files as the user has them."""
    limit: int | None = None
    """Only the first so many groups (dialogues, questions); None: all. The runner does not cut: the benchmark does."""
    seed: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    """The benchmark's own options: --option key=value."""

    def need_data(self, what: str) -> Path:
        """The directory or file of --data. Raises UserError that says `what` it must be."""
        if self.data is None:
            raise UserError(f"--data is missing; it must be {what}")
        if not self.data.exists():
            raise UserError(f"{self.data} does not exist; --data must be {what}")
        return self.data

    def only(self, known: Iterable[str]) -> None:
        """Raises UserError where an option is given that the benchmark does not know."""
        known = sorted(known)
        for name in self.extra:
            if name not in known:
                there_are = f"it has {', '.join(known)}" if known else "it has none"
                raise UserError(f"this benchmark has no option {name!r}; {there_are}")

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first where it is not given. Raises UserError."""
        value = self.extra.get(name, choices[0])
        if value not in choices:
            raise UserError(f"--option {name}={value}: it must be one of {', '.join(choices)}")
        return value

    def text(self, name: str, default: str = "") -> str:
        return self.extra.get(name, default)

    def number(self, name: str, default: float) -> float:
        """Raises UserError where it is not a finite number."""
        try:
            value = float(self.extra.get(name, default))
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise UserError(f"--option {name}={self.extra[name]}: it must be a number")
        return value

    def path(self, name: str) -> Path | None:
        """An existing file or directory, or None where it is not given. Raises UserError."""
        if not self.extra.get(name):
            return None
        path = Path(self.extra[name]).expanduser()
        if not path.exists():
            raise UserError(f"--option {name}={path}: there is no such file or directory")
        return path


def parse_extra(pairs: Iterable[str]) -> dict[str, str]:
    """`key=value` words -> options. Raises UserError."""
    extra: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--option {pair}: write it as key=value")
        if name in extra:
            raise UserError(f"--option {name} is given twice")
        extra[name] = value
    return extra
