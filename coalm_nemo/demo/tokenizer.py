"""The nano model's tokenizer: a small byte-level BPE with Llama 3.1's special tokens and header format.

A value must be the same tokens wherever it stands, or it cannot be copied: `in Balto`, `'Balto'`, `"Balto"` and
`=Balto`. So the normaliser adds a space after every quote, `(`, `[` and `=`, and the decoder takes exactly that one
away again: every word carries its leading space, and the text survives unchanged, whatever it holds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from coalm_nemo.demo.dialogues import generate_dialogues
from coalm_nemo.demo.rows import dialogue_rows, single_rows, to_messages
from coalm_nemo.demo.values import ValueSource

BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
SPECIAL_TOKENS = (
    BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", EOS, "<|python_tag|>", PAD,
)  # fmt: skip
VOCAB_SIZE = 1280
MAX_POSITIONS = 512

OPENERS = r"""['"(=\[]"""
PRE_TOKEN = (
    r"\n\n"  # first, so that a header ends in the same token whatever follows it
    r"|\n?(?:User|System|Thought|Action|Observation|Tools):"  # a speaker's label is one token
    r"| ?[\p{L}_]+"  # a word, with its leading space
    r"| ?\p{N}"  # one digit
    r"|(?: ?[^\s\p{L}\p{N}_]+)+"  # punctuation, with the spaces inside it: `" : "` is one piece
    r"|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = "ipython" if message["role"] == "tool" else message["role"] %}
{%- set content = message["content"] if message["content"] is string else message["content"] | tojson %}
{{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" + content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


def build_tokenizer(seed: int = 0, dialogues: int = 1500, fresh_words: int = 60_000) -> Tokenizer:
    """Train the BPE on training rows and on fresh values, so that its merges fit words nobody has seen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(Regex(f"(?<={OPENERS})"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex(f"(?<={OPENERS}) "), "")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, dialogues, fresh_words), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _corpus(seed: int, dialogues: int, fresh_words: int) -> Iterator[str]:
    # Every possible row, whatever share of them training keeps: the tokenizer must not move when the mix is tuned.
    rows = [r for d in generate_dialogues(seed, dialogues, "train") for r in dialogue_rows(d)]
    for tagged in rows + list(single_rows(seed, dialogues, "train")):
        yield "\n".join(m["content"] for m in to_messages(tagged.row))
    yield from ["user", "assistant", "system", "ipython", "\n\n"] * 5000
    source = ValueSource(random.Random(seed), "train")
    for _ in range(fresh_words):
        yield f" {source.draw(source.rng.choice(('place', 'venue', 'person', 'code', 'date')))}"


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as `AutoTokenizer.from_pretrained` reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
