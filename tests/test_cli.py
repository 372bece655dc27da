"""The command line: what each ending prints and returns, recipes and their overrides, and that help is quick."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.errors import Diverged, Preempted, UserError
from llama_jax.verbs import first_steps

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama_jax.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def outcome(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    return code, *capsys.readouterr()


def fail_with(monkeypatch, error: BaseException) -> None:
    def verb(argv):
        raise error

    monkeypatch.setattr(first_steps, "doctor", verb)


def test_a_gpus_memory_is_ours_but_for_a_twelfth_unless_the_user_says_otherwise(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.setenv(name, "0.5")
    assert cli.main(["--version"]) == 0 and os.environ[name] == "0.5"
    monkeypatch.delenv(name)
    assert cli.main(["--version"]) == 0 and os.environ[name] == "0.92"
    monkeypatch.delenv(name)
    assert cli.end_of(lambda: os.environ[name] != "0.92") == 0  # as an experiment sees it


def test_help_is_quick_and_loads_nothing_heavy():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0 and result.stderr == ""
    assert min(seconds) < 0.5  # the best of three, because other tests may hold the cores
    code = "import sys; from llama_jax.cli import main; main(['--help']); print({m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = loaded.stdout.splitlines()[-1]
    for heavy in ("jax", "numpy", "tyro", "rich", "flax", "sentencepiece", "grain"):
        assert f"'{heavy}'" not in modules


def test_a_verb_of_two_words_is_a_function_of_both(capsys, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "ghost-attention", ("first_steps", "remember the instruction"))
    monkeypatch.setattr(first_steps, "ghost_attention", lambda argv: len(argv), raising=False)
    assert outcome(capsys, "ghost-attention", "a", "b")[0] == 2
    lines = outcome(capsys, "--help")[1].splitlines()
    columns = {line.index(what) for line in lines for _, what in cli.VERBS.values() if line.endswith(what)}
    assert len(columns) == 1 and "  ghost-attention remember the instruction" in lines


def test_help_lists_every_verb_with_examples(capsys):
    code, out, _ = outcome(capsys, "--help")
    assert code == 0
    for verb, (_, what) in cli.VERBS.items():
        assert f"  {verb} " in out and what in out
    examples = [line for line in out.splitlines() if line.startswith("  llama-jax ")]
    assert {line.split()[1] for line in examples} <= set(cli.VERBS)
    assert len(examples) >= 4


@pytest.mark.parametrize("words", [[verb] for verb in cli.VERBS if verb != "pretrain"] + [["tokenizer", "train"]])
def test_each_verb_helps_with_examples(capsys, words):
    code, out, _ = outcome(capsys, *words, "--help")
    assert code == 0
    assert f"  llama-jax {' '.join(words)}" in out.split("Examples:")[1]
    assert "Args:" not in out  # the docstring's source does not leak into the help


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no verb given"),
        (["pretain"], "did you mean `llama-jax pretrain`"),
        (["doctr", "--json"], "did you mean `llama-jax doctor`"),
        (["xyzzy"], "it is one of doctor, plan, tokenizer"),
        (["doctor", "--jsn"], "--json"),
        (["tokenizer", "trian"], "train, encode, decode, info"),
        (["tokenizer", "info"], "MODEL"),
        (["tokenizer", "decode", "m", "x"], "Error parsing ID..."),
        (["generate", "a", "b", "--max-new-token", "3"], "--max-new-tokens"),
        (["generate", "a", "b", "--temperature", "hot"], "could not convert string to float"),
        (["tokenize", "text:a"], "--tokenizer"),
        (["demo", "--outt", "x"], "--out"),
        (["tokenizer", "info", "no/such.model"], "no/such.model"),
    ],
)
def test_bad_input_ends_with_2_and_names_the_remedy(capsys, words, message):
    code, out, err = outcome(capsys, *words)
    assert code == 2
    flowing = " ".join(err.replace("│", " ").split())  # the parser breaks lines to the terminal's width
    assert message in flowing and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the corpus is empty"), 2, "error: the corpus is empty"),
        (Diverged("3 steps"), 3, "diverged: 3 steps"),
        (Preempted("saved step 7"), 42, "preempted: saved step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "x", "runs/a"), 2, "error: No space left on device at runs/a; free some space"),
        (PermissionError(errno.EACCES, "x", "/etc/a"), 2, "error: Permission denied at /etc/a; change its permissions"),
        (MemoryError(), 2, "does not fit into the host's memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "does not fit into the device's memory"),
        (ModuleNotFoundError("x", name="grain.python"), 2, "the Python package grain.python is missing"),
    ],
)
def test_foreseen_endings_have_their_code_and_no_traceback(capsys, monkeypatch, error, code, message):
    fail_with(monkeypatch, error)
    found, out, err = outcome(capsys, "doctor")
    assert found == code and message in err and "Traceback" not in err and out == ""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        RuntimeError("a bug"),
        FileNotFoundError(errno.ENOENT, "a bug"),
        ModuleNotFoundError("a bug", name="llama_jax.missing"),
    ],
)
def test_a_bug_ends_with_1_and_a_traceback(capsys, monkeypatch, error):
    fail_with(monkeypatch, error)
    code, _, err = outcome(capsys, "doctor")
    assert code == 1 and "Traceback" in err and "a bug" in err


@pytest.mark.parametrize("words", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_code(capsys, monkeypatch, words):
    fail_with(monkeypatch, UserError("the corpus is empty"))
    code, _, err = outcome(capsys, *words)
    assert code == 2 and "Traceback" in err and "error: the corpus is empty" in err


def test_debug_behind_two_dashes_is_text():
    assert cli._take_debug(["generate", "c", "--", "--debug"]) == (["generate", "c", "--", "--debug"], False)
    assert cli._take_debug(["generate", "--debug", "c", "--", "--debug"]) == (["generate", "c", "--", "--debug"], True)


def test_a_reader_that_leaves_ends_it_quietly():
    script = f"{{ sleep 0.5; {sys.executable} -m llama_jax.cli --help; }} | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == str(cli.READER_GONE) and result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "llama_jax.cli", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 2
    assert "No space left on device" in result.stderr and "Traceback" not in result.stderr
