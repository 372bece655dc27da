"""`llama-jax chat`: on a pipe the answers alone, under someone's hands a prompt, commands, a status line, and Ctrl-C that stops an answer only."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.generation.llama import Llama
from llama_jax.generation.session import Chat
from llama_jax.generation.terminal import HELP, converse
from llama_jax.text.chat import DEFAULT_SYSTEM_PROMPT, Llama2Chat, Plain
from tests.generation.scripted import ScriptedLlama
from tests.stories260k import FOLDER

ROOT = Path(__file__).parents[2]


@pytest.fixture
def talk(monkeypatch, capsys, tokenizer):
    """Runs a conversation whose answers are one, two, three and four; gives it with stdout and stderr."""

    def run(lines: str | bytes, *, typed: bool = False, **options) -> tuple[Chat, str, str]:
        content = lines if isinstance(lines, bytes) else lines.encode()
        stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        stdin.isatty = lambda: typed
        monkeypatch.setattr(sys, "stdin", stdin)
        chat = Chat(ScriptedLlama(tokenizer, [["one"], ["two"], ["three"], ["four"]]), Llama2Chat(), **options)
        run.chat = chat
        converse(chat)
        return chat, *capsys.readouterr()

    return run


def contents(chat: Chat) -> list[str]:
    return [message.content for message in chat.history]


def test_a_line_is_a_message_and_stdout_is_the_answers(talk):
    chat, out, err = talk("hello\n\n  \r\nwho?\r\nlast without a newline")
    assert (out, err) == ("one\ntwo\nthree\n", "")
    assert contents(chat) == ["hello", "one", "who?", "two", "last without a newline", "three"]


def test_commands_act_and_report_on_stderr(talk, tmp_path):
    file = tmp_path / "my talk.json"
    lines = f"/system be brief\na\n/regen\n/save {file}\n/reset\nb\n/load {file}\n/help\n/exit\nnever\n"
    chat, out, err = talk(lines)
    assert out == "one\ntwo\nthree\n"
    assert contents(chat) == ["be brief", "a", "two"]
    reports = ["system prompt: be brief", f"saved to {file}", "a new conversation", f"loaded 3 messages from {file}"]
    assert err.splitlines() == [*reports, *HELP.splitlines()]


def test_system_alone_takes_it_away(talk):
    chat, _, err = talk("a\n/system\n", system="be brief")
    assert contents(chat) == ["a", "one"] and err == "system prompt: none\n"


def test_two_slashes_begin_a_message_with_one(talk):
    assert contents(talk("//etc is what?\n")[0]) == ["/etc is what?", "one"]


WRONG = [
    ("/foo bar", "unknown command /foo; /help lists them"),
    ("/save", "/save needs a file"),
    ("/load /no/such/file", "No such file"),
    ("/reset now", "/reset takes nothing after it, found 'now'"),
    ("/exit now", "/exit takes nothing after it, found 'now'"),
    ("what does [INST] mean?", "'[INST]'"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_mistake_ends_a_pipe_by_its_line(talk, capsys, line, message):
    with pytest.raises(Exception, match=f"line 3 of the input: .*{re.escape(message)}") as caught:
        talk(f"hello\n\n{line}\nmore\n")
    assert type(caught.value).__name__ == "UserError"
    assert capsys.readouterr().out == "one\n"


@pytest.mark.parametrize(("line", "message"), [*WRONG, ("/regen", "say something first")])
def test_a_mistake_is_reported_to_whoever_types(talk, line, message):
    chat, out, err = talk(f"{line}\nhello\n", typed=True)
    assert message in err and err.count("error: ") == 1
    assert out == "one\n" and contents(chat) == ["hello", "one"]


def test_bytes_that_are_no_text_are_bad_input(talk):
    with pytest.raises(Exception, match="line 2 of the input is not UTF-8"):
        talk(b"hello\nna\xefve\n")


def test_what_is_forgotten_is_said_once_each_time(talk, monkeypatch, tokenizer):
    """The prompts of a, b and c take some 20 tokens, and some 40 and 60 with what was said before."""
    monkeypatch.setattr(ScriptedLlama.__init__, "__defaults__", (75, 0.0))
    _, out, err = talk("a\nb\nc\n")
    assert out == "one\ntwo\nthree\n"
    assert err == "the context is full: of 3 turns the model no longer sees the oldest 1\n"


@pytest.mark.parametrize(
    ("flags", "template", "system"),
    [
        ([], Llama2Chat(), None),
        (["--plain"], Plain(), None),
        (["--default-system-prompt"], Llama2Chat(), DEFAULT_SYSTEM_PROMPT),
        (["--system", "be brief"], Llama2Chat(), "be brief"),
    ],
)
def test_flags_choose_format_and_system_prompt(monkeypatch, tokenizer, flags, template, system):
    loaded, begun = [], []
    llama = ScriptedLlama(tokenizer, [])
    llama.chat = lambda *words, **settings: begun.append((words, settings))
    monkeypatch.setattr(Llama, "load", lambda *words, **options: loaded.append((words, options)) or llama)
    monkeypatch.setattr("llama_jax.generation.terminal.converse", lambda chat: None)
    sampling = ["--temperature", "0.5", "--top-p", "0.8", "--top-k", "7", "--seed", "3", "--max-new-tokens", "9"]
    assert cli.main(["chat", "x", *flags, *sampling, "--int8", "--mesh", "tensor=2"]) == 0
    assert loaded == [(("x",), {"mesh": "tensor=2", "int8": True})]
    settings = {"temperature": 0.5, "top_p": 0.8, "top_k": 7, "seed": 3, "max_new_tokens": 9}
    assert begun == [((system,), {"template": template, **settings})]


def test_bad_input_ends_with_2(capsys, tmp_path):
    for words, message in (
        ([tmp_path / "none"], "none"),
        (["x", "--system", "a", "--default-system-prompt"], "keep one"),
    ):
        assert cli.main(["chat", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err


def test_a_real_model_answers_on_a_pipe(shared):
    """The likeliest answers of a published model, of which the second goes on from the first; nothing else is printed."""
    command = [sys.executable, "-m", "llama_jax.cli", "chat", str(shared / FOLDER), "--plain"]
    done = subprocess.run(
        [*command, "--temperature", "0", "--max-new-tokens", "12"],
        input="Once upon a time\nThe dog\n",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    answers = 'One day, a little girl named Lily\n"Hi, little girl named Lily. I\n'
    assert (done.returncode, done.stdout, done.stderr) == (0, answers, "")


CHILD = """
import fcntl, sys, termios
from llama_jax import cli
from llama_jax.generation.session import Chat
from llama_jax.generation.terminal import converse
from llama_jax.text.chat import Llama2Chat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.verbs import generation
from tests.generation.scripted import ScriptedLlama

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the pseudo-terminal's Ctrl-C is ours
answers = [["on", *[" and on"] * 1000], ["to", " be", " sure"]]
chat = Chat(ScriptedLlama(Tokenizer.load(sys.argv[1]), answers, delay=0.05), Llama2Chat())
generation.chat = lambda argv: converse(chat)
code = cli.main(["chat"])
print([message.content[:6] for message in chat.history])
sys.exit(code)
"""


class Terminal:
    """Someone at the keyboard of a program; reads until a text comes, and types."""

    def __init__(self, code: str, *words: str):
        self._ours, theirs = os.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
        # A shell in the background has SIGINT ignored, which a child would inherit.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        signal.signal(signal.SIGINT, before)
        os.close(theirs)

    def until(self, text: str, seconds: float = 120, key: str = "") -> str:
        """What is printed up to the end of `text`; a key is pressed until something comes of it."""
        seen, deadline = b"", time.monotonic() + seconds
        while text.encode() not in seen:
            left = max(deadline - time.monotonic(), 0)
            assert left, f"no {text!r} in {seen!r}"
            self.type(key)
            if select.select([self._ours], [], [], min(left, 2) if key else left)[0]:
                seen, key = seen + os.read(self._ours, 1), ""
        return seen.decode()

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("farewell", "code"), [("\x04", 0), ("\x03", 130)], ids=["Ctrl-D", "Ctrl-C"])
def test_at_a_terminal(tmp_path, tokenizer, farewell, code):
    terminal = Terminal(CHILD, str(tokenizer.save(tmp_path / "t.model")))
    try:
        assert "/help lists the commands" in terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("on and on")
        terminal.type("\x03")
        terminal.until("stopped; what was said stays")
        terminal.until("> ")
        terminal.type("and?\n")
        answer = terminal.until("> ")
        assert re.search(r"to be sure\r\nttft \d+\.\d\d s · \d+ tok/s · context \d+/4096\r\n.*> $", answer)
        # Again and again: what comes between readline's prompt and its first look at the keys, readline misses.
        assert "['hello', 'on and', 'and?', 'to be ']" in terminal.until("]", key=farewell)
        assert terminal.process.wait(60) == code
    finally:
        terminal.process.kill()
        terminal.process.wait()
