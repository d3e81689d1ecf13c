"""Does `dpo-engine chat` answer as the model does, turn by turn, with the adapter on and off?"""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

import torch

from dpo_engine.cli import chat as chatting
from dpo_engine.cli.main import main
from support.adapters import adapted, plain, save_adapter, save_base, start


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "run", base)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`dpo-engine chat`, called in this process with lines on stdin: exit code, stdout, stderr."""

    def run(lines: str, *arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dpo-engine", "chat", *map(str, arguments), "--dtype", "float32"])
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def said(model: Any, folder: Path, messages: list[dict[str, str]], most: int = 12) -> str:
    """The greedy answer, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=ends,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_pipe_is_answered_line_by_line_by_a_process_of_its_own(base: Path, adapter: Path) -> None:
    process = start("chat", adapter, "--temperature", "0", "--max-new-tokens", "12", "--dtype", "float32")
    out, err = process.communicate("where is the cat?\n/base\n/exit\nnever read\n", timeout=200)
    assert process.returncode == 0, err
    assert out.strip() == said(adapted(base, adapter), base, [user("where is the cat?")]).strip()
    assert "the adapter is off" in err and "Traceback" not in err


def test_the_adapter_can_be_switched_and_a_conversation_forgotten(chat: Any, base: Path, adapter: Path) -> None:
    flags = [adapter, "--temperature", 0, "--max_new_tokens", 12]
    lines = "where is the cat?\n/clear\n/base\nwhere is the cat?\n/base\n/clear\nwhere is the cat?\n"
    code, out, err = chat(lines, *flags)
    assert code == 0, err
    policy = adapted(base, adapter)
    on = said(policy, base, [user("where is the cat?")])
    with policy.disable_adapter():
        off = said(policy, base, [user("where is the cat?")])
    assert on != off
    assert out == "".join(answer + "\n" for answer in (on, off, on))


def test_turns_know_of_those_before_and_of_the_system_message(chat: Any, base: Path) -> None:
    flags = [base, "--temperature", 0, "--max_new_tokens", 8, "--system", "hello there"]
    code, out, err = chat("where is the cat?\n\nwhere is the dog?\n/base\n/what\n", *flags)
    assert code == 0, err
    model, messages = plain(base), [{"role": "system", "content": "hello there"}, user("where is the cat?")]
    first = said(model, base, messages, 8)
    messages += [{"role": "assistant", "content": first.strip()}, user("where is the dog?")]
    assert out == first + "\n" + said(model, base, messages, 8) + "\n"
    assert "there is no adapter to switch" in err and "/what is no command" in err


def test_a_seed_decides_what_is_sampled(chat: Any, base: Path) -> None:
    answers = [chat("where?\n", base, "--max_new_tokens", 12, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_without_a_chat_template_lines_are_continued(chat: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", template=None)
    code, out, err = chat("the cat\nthe cat\n", base, "--temperature", 0, "--max_new_tokens", 6)
    assert code == 0 and "no chat template" in err
    first, second = out.splitlines()
    assert first == second
    code, out, err = chat("the cat\n", base, "--system", "be brief")
    assert code == 2 and "error: system" in err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = chatting._Collecting.on_finalized_text
    calls = []

    def interrupted(self: Any, text: str, stream_end: bool = False) -> None:
        written(self, text, stream_end)
        calls.append(text)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chatting._Collecting, "on_finalized_text", interrupted)
    code, out, err = chat(
        "where is the cat?\n/clear\nwhere is the dog?\n", base, "--temperature", 0, "--max_new_tokens", 12
    )
    assert code == 0 and "(stopped)" in err
    assert out.splitlines()[-1] == said(plain(base), base, [user("where is the dog?")]).splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["--max_new_tokens", "0"], "max_new_tokens=0 is out of range"),
    ],
)
def test_a_value_out_of_range_is_refused(chat: Any, base: Path, flags: list[str], message: str) -> None:
    code, out, err = chat("where?\n", base, *flags)
    assert code == 2 and out == "" and message in err


def test_a_conversation_that_is_too_long_is_not_cut_in_silence(chat: Any, base: Path) -> None:
    code, out, err = chat(
        "the cat sat on the mat " * 30 + "\nwhere?\n", base, "--temperature", 0, "--max_new_tokens", 3
    )
    assert code == 0 and "the model reads 128; /clear" in err
    assert out == said(plain(base), base, [user("where?")], 3) + "\n"
