"""A directory that answers: the same text in any batch, the training's own tokens, and an end where there should be one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from coalm_nemo.data.encoding import RowEncoder
from coalm_nemo.data.rows import Row
from coalm_nemo.demo.pipeline import NANO_BASE
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.fingerprint import directory_fingerprint
from coalm_nemo.evaluation.local_model import LocalModel
from coalm_nemo.evaluation.runner import Reply, cut_at_stop


def prompts(count: int, most: int = 12) -> list[Prompt]:
    """Of very uneven lengths, with limits of their own."""
    return [
        Prompt(
            [{"role": "user", "content": "the train leaves at nine " * (1 + 7 * n % 11)}],
            "",
            max_new_tokens=most - n % 5,
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LocalModel:
    return LocalModel(tiny_llama, batch_size=4, dtype="fp32", device="cpu")


def test_a_batch_answers_as_one_prompt_alone_does(model: LocalModel) -> None:
    """Against transformers by hand: one prompt, no padding, no stopping of ours."""
    import torch

    asked = prompts(10)
    answers = model.answer(asked)
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([model.prompt_ids(prompt)])
        out = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.max_new_tokens, do_sample=False,
            eos_token_id=model.eos, pad_token_id=model.pad,
        )  # fmt: skip
        assert model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer
    assert len(set(answers)) > 3


def test_the_prompt_has_the_tokens_that_training_sees() -> None:
    model = LocalModel(NANO_BASE, dtype="fp32", device="cpu")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Give the state as JSON.\n\nUser: Hi "},
        {"role": "assistant", "content": "System: {}"},
        {"role": "user", "content": "And now?"},
    ]
    row = Row("r", [*messages, {"role": "assistant", "content": "Action: F(a='x')"}])
    encoded = RowEncoder(NANO_BASE).encode([row], loss="last", max_tokens=512)[0]
    target = int(encoded.loss_mask.argmax())  # type: ignore[union-attr]
    assert model.prompt_ids(Prompt(messages, "")) == encoded.tokens[:target].tolist()  # type: ignore[union-attr]


def test_a_prompt_longer_than_the_context_is_an_empty_answer_with_its_reason(model: LocalModel) -> None:
    long = Prompt([{"role": "user", "content": "the train " * 1000}], "")
    replies = dict(model.stream([*prompts(2), long]))
    assert replies[2] == Reply("", "prompt_too_long") and replies[0].fault in ("", "cut_short")


def test_the_context_limits_the_answer(model: LocalModel) -> None:
    words = next(n for n in range(1, 600) if len(model.prompt_ids(of_words(n))) > model.context_tokens - 6)
    asked = of_words(words)
    room = model.context_tokens - len(model.prompt_ids(asked))
    if room <= 0:
        pytest.fail("no prompt leaves a little room")
    (reply,) = (r for _, r in model.stream([asked]))
    assert len(model.tokenizer.encode(reply.text, add_special_tokens=False)) <= room


def of_words(count: int) -> Prompt:
    return Prompt([{"role": "user", "content": "a " * count}], "", max_new_tokens=100)


def test_it_stops_before_a_stop_string_and_at_once(model: LocalModel) -> None:
    free = Prompt([{"role": "user", "content": "weather"}], "", max_new_tokens=40)
    (text,) = model.answer([free])
    assert len(text) > 6
    stop = text[4:7]
    limited = Prompt(free.messages, "", max_new_tokens=40, stop=("never there", stop))
    other = Prompt([{"role": "user", "content": "red cat"}], "", max_new_tokens=40)
    alone = model.answer([other])
    assert model.answer([limited, other]) == [text[: text.index(stop)].strip(), *alone]


@pytest.mark.parametrize(("text", "stop", "cut"), [
    ("abc", (), "abc"), ("abc", ("c", "b"), "a"), ("abc", ("x",), "abc"), ("", ("x",), ""), ("aXbY", ("Y", "X"), "a"),
])  # fmt: skip
def test_the_first_stop_string_cuts(text: str, stop: tuple[str, ...], cut: str) -> None:
    assert cut_at_stop(text, stop) == cut


def test_every_end_of_turn_of_generation_config_ends_the_answer(
    tiny_llama: Path, tmp_path: Path, model: LocalModel
) -> None:
    free = Prompt([{"role": "user", "content": "weather"}], "", max_new_tokens=20)
    ids = model.tokenizer.encode(model.answer([free])[0], add_special_tokens=False)
    assert len(set(ids)) > 2
    other = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    given = json.loads((other / "generation_config.json").read_text())
    given["eos_token_id"] = [given["eos_token_id"], ids[2]]
    given |= {"do_sample": True, "temperature": 5.0, "top_p": 0.1}  # what the directory wishes does not make it random
    (other / "generation_config.json").write_text(json.dumps(given))
    (reply,) = (r for _, r in LocalModel(other, dtype="fp32", device="cpu").stream([free]))
    end = ids.index(ids[2])
    assert reply == Reply(model.tokenizer.decode(ids[:end]).strip())


def test_bf16_answers_too(tiny_llama: Path) -> None:
    assert len(LocalModel(tiny_llama, dtype="bf16", device="cpu").answer(prompts(3))) == 3


@pytest.mark.gpu
def test_the_gpu_answers_as_the_cpu_in_fp32(tiny_llama: Path, model: LocalModel) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert LocalModel(tiny_llama, dtype="fp32", device="cuda").answer(prompts(10)) == model.answer(prompts(10))


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
    (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    (lambda d: (d / "config.json").unlink(), "config.json|tokenizer"),
    (lambda d: (d / "model.safetensors").write_bytes(b"\x08"), "cannot be loaded"),
    (lambda d: (d / "adapter_config.json").write_text("{}"), "merge-lora"),
    (lambda d: (d / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}"), "no such role"),
])  # fmt: skip
def test_a_directory_that_cannot_answer_is_one_sentence(tiny_llama: Path, tmp_path: Path, spoil, sentence: str) -> None:  # type: ignore[no-untyped-def]
    spoilt = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    spoil(spoilt)
    with pytest.raises(UserError, match=sentence) as error:
        LocalModel(spoilt, dtype="fp32", device="cpu").answer(prompts(1))
    assert "\n" not in str(error.value)


def test_the_fingerprint_changes_with_any_byte_and_with_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    copy, kept = Path(shutil.copytree(tiny_llama, tmp_path / "m")), tmp_path / "hashes.json"
    first = directory_fingerprint(copy, kept)
    assert first == directory_fingerprint(tiny_llama, tmp_path / "other.json") == directory_fingerprint(copy, kept)
    (copy / "README.md").write_text("words")
    assert directory_fingerprint(copy, kept) == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    second = directory_fingerprint(copy, kept)
    (copy / "chat_template.jinja").write_text("other")
    assert len({first, second, directory_fingerprint(copy, kept)}) == 3
    kept.write_text("nonsense")
    assert directory_fingerprint(copy, kept) == directory_fingerprint(copy, tmp_path / "fresh.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model files"):
        directory_fingerprint(tmp_path / "empty", kept)
