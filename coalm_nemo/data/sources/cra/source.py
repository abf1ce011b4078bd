"""What SGD and MultiWOZ have in common as sources: files, blocks (one a dialogue file), options, figures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Block, Dropped, Source
from coalm_nemo.data.sources.cra.dialogue import Dialogue, read_dialogues
from coalm_nemo.data.sources.cra.prompts import PromptOptions
from coalm_nemo.data.sources.cra.rows import RowOptions, dialogue_rows
from coalm_nemo.data.sources.cra.schema import Schema, read_schema
from coalm_nemo.data.sources.cra.turns import Turn
from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    from coalm_nemo.data.sources.cra.writer import Writer, WriterOptions

TOOLS = ("all", "dialogue")


@dataclass(frozen=True)
class CraSource(Source):
    """`path`: directory with the schema and dialogues_*.json, or its parent that holds it as `train/`."""

    tools: str = "all"
    """all | dialogue: which functions the tool list shows, those of every service of the schema as in the published rows,
    or those of the dialogue's own services: an action row is then a third as long, and fits a small model."""
    optional_slots: bool = False
    """Whether the tool list shows optional arguments with their defaults; the published one shows required ones only."""
    thought_target: bool = False
    """Whether the model learns to write the thoughts; in the published rows they stand in the prompt."""
    strict_signatures: bool = False
    """Whether calls go that use an argument which the tool list does not show."""
    action_rows: bool = True
    response_rows: bool = True
    writer: str = ""
    """Base URL of an OpenAI-compatible endpoint that rewords thoughts and answers, such as http://localhost:8000/v1. Its
    key, where it needs one, is read from OPENAI_API_KEY."""
    writer_model: str = ""
    """The model's name there; needed with `writer`."""
    writer_cache: str = ""
    """SQLite file, on a local disk, of the answers so far; by default below the user's cache directory."""
    writer_budget_requests: int = 0
    """Most requests of one build, retries included; what is left then keeps its original words. 0: no limit."""
    writer_budget_tokens: int = 0
    """The same for prompt and answer tokens as the endpoint counts them (usage.total_tokens)."""
    writer_retries: int = 5
    """Further attempts after 429, 5xx, a timeout or a lost connection, ever longer apart."""
    writer_timeout_s: float = 60.0
    writer_concurrency: int = 16
    """Requests under way at once in every worker process."""
    writer_temperature: float = 0.7

    def __post_init__(self) -> None:
        if self.tools not in TOOLS:
            raise UserError(f"tools is '{self.tools}'; use one of {', '.join(TOOLS)}")
        if self.writer:
            _ = self.writer_options  # checked, and named as one build, before workers fork
        elif self.writer_model:
            raise UserError("writer_model is given without writer, the endpoint's base URL")

    def schema_names(self) -> tuple[str, ...]:
        """File names under which the schema may lie."""
        return ("schema.json",)

    def today(self) -> str:
        """The sentence of the prompt that gives the date."""
        return ""

    def rename(self, slot: str) -> str:
        """A slot name as the files have it -> as calls have it."""
        return slot

    @abstractmethod
    def turns(self, dialogue: Dialogue, seed: int) -> list[Turn]:
        """The parts of a dialogue's turns."""

    @cached_property
    def schema(self) -> Schema:
        return read_schema(self._schema_file(), self.rename)

    @cached_property
    def row_options(self) -> RowOptions:
        tools = "\n".join(self.schema.signatures(self.optional_slots))
        prompt = PromptOptions(tools, self.optional_slots, self.today(), self.thought_target)
        of_dialogue = self.tools == "dialogue"
        return RowOptions(prompt, self.strict_signatures, self.action_rows, self.response_rows, of_dialogue)

    @cached_property
    def writer_options(self) -> WriterOptions:
        from coalm_nemo.data.sources.cra.writer import WriterOptions

        return WriterOptions(
            url=self.writer,
            model=self.writer_model,
            cache=self.writer_cache,
            budget_requests=self.writer_budget_requests,
            budget_tokens=self.writer_budget_tokens,
            retries=self.writer_retries,
            timeout_s=self.writer_timeout_s,
            concurrency=self.writer_concurrency,
            temperature=self.writer_temperature,
        )

    @cached_property
    def rewriter(self) -> Writer:
        """First used in a worker: a connection must not be carried over a fork."""
        from coalm_nemo.data.sources.cra.writer import Writer

        return Writer(self.writer_options, self.schema)

    def files(self) -> list[Path]:
        return [self._schema_file(), *self._dialogue_files()]

    def blocks(self) -> Iterator[Block]:
        self._schema_file()
        for file in self._dialogue_files():
            yield Block(file, 1)

    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        dialogues = self._dialogues_in_turns(block, seed)
        if self.writer:
            dialogues = self.rewriter.rewrite(block, list(dialogues), seed)
        for dialogue_id, turns in dialogues:
            yield from dialogue_rows(dialogue_id, turns, self.schema, self.row_options)

    def _dialogues_in_turns(self, block: Block, seed: int) -> Iterator[tuple[str, list[Turn]]]:
        for dialogue in read_dialogues(block.file, self.rename):
            try:
                yield dialogue.dialogue_id, self.turns(dialogue, seed)
            except UserError as e:
                raise UserError(f"{block.file}: dialogue {dialogue.dialogue_id}: {e}") from e

    def counts(self, block: Block) -> dict[str, int]:
        dialogues = read_dialogues(block.file, self.rename)
        turns = [turn for dialogue in dialogues for turn in dialogue.turns]
        return {
            "dialogues": len(dialogues),
            "turns": len(turns),
            "system_turns": sum(not turn.user for turn in turns),
            "calls": self.calls(dialogues),
            **(self.rewriter.counts(block) if self.writer else {}),
        }

    def calls(self, dialogues: Sequence[Dialogue]) -> int:
        """Number of the source's own calls."""
        return sum(bool(frame.method) for d in dialogues for turn in d.turns for frame in turn.frames)

    def _directory(self) -> Path:
        directory = Path(self.path)
        return next((d for d in (directory, directory / "train") if any(d.glob("dialogues_*.json"))), directory)

    def _dialogue_files(self) -> list[Path]:
        files = sorted(self._directory().glob("dialogues_*.json"))
        if not files:
            raise UserError(
                f"{self.path} holds no dialogues_*.json, neither itself nor in train/; "
                f"{type(self).__name__} reads a directory of them beside {self.schema_names()[0]}"
            )
        return files

    def _schema_file(self) -> Path:
        self._dialogue_files()
        places = [self._directory(), Path(self.path)]
        files = [place / name for place in places for name in self.schema_names()]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(f"{self._directory()} holds dialogue files but no {' or '.join(self.schema_names())}")
        return found
