"""The command `llama-jax`: finds the verb, and turns every ending into a message and an exit code.

Exit codes: 0 done, 1 a bug (traceback), 2 bad input, 3 diverged, 42 preempted and saved; 130 interrupted and 141 reader
gone, as shells have it. Nothing is imported before it is needed: `llama-jax --help` loads the standard library and this file.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from llama_jax import __version__
from llama_jax.errors import PREEMPTED, Diverged, Preempted, UserError
from llama_jax.planning.hardware import GPU_MEMORY_SHARE

OK, BUG, BAD_INPUT, DIVERGED, INTERRUPTED, READER_GONE = 0, 1, 2, 3, 130, 141

# Each verb's module in llama_jax.verbs, in which a function of its name (ghost-attention is ghost_attention) takes the
# words behind the verb; and what it does, in a line.
VERBS = {
    "doctor": ("first_steps", "what this machine has, what is missing, and the command that installs it"),
    "plan": ("planning", "what a recipe takes of TPUs or GPUs, and how fast it can be, without any"),
    "tokenizer": ("text", "train a SentencePiece tokenizer, look into one, encode, decode"),
    "tokenize": ("text", "turn text into token shards once, for corpora that are read often"),
    "pretrain": ("training", "train a model from a recipe; any field can be overridden"),
    "sft": ("training", "fine-tune a model on dialogues: every weight, or low-rank adapters"),
    "ghost-attention": ("training", "dialogues that hold an instruction to the end, to fine-tune on"),
    "reward": ("rlhf", "train a reward model on preferences, for what comes after fine-tuning"),
    "dpo": ("rlhf", "train a model on preferences directly, without a reward model"),
    "reject": ("rlhf", "sample answers and keep those a reward model scores best, to fine-tune on"),
    "ppo": ("rlhf", "train a model to answer as reward models or a function like it best"),
    "distill": ("rlhf", "safer answers to adversarial prompts, to fine-tune on"),
    "rlhf": ("rlhf", "versions of a chat model: rejection sampling, again and again, then PPO on top"),
    "generate": ("generation", "continue a text with a trained model"),
    "chat": ("generation", "talk with a fine-tuned model, in the terminal or on a pipe"),
    "eval": ("evaluation", "ask a model the paper's benchmarks, and set its scores beside the paper's"),
    "compare": ("human", "compare models by people or a model: pages to rate on, win rates, agreement"),
    "convert": ("weights", "weights between Hugging Face, Meta, llama2.c and our own form, exactly"),
    "verify": ("weights", "whether two checkpoints of any form are the same model"),
    "download": ("weights", "fetch a checkpoint from the Hugging Face hub, its needed files alone"),
    "report": ("report", "one page on runs: curves, numbers, samples, energy, recipes; or a model card"),
    "audit": ("audit", "whom a corpus speaks of, in which languages and how toxic it is, beside the paper's"),
    "contamination": ("contamination", "how much of an evaluation stands in a training corpus, and whether it shows"),
    "demo": ("first_steps", "the whole pipeline in minutes on a laptop, from raw text to samples"),
}

EXAMPLES = """\
  llama-jax doctor
  llama-jax tokenizer train "text:books/*.txt" --vocab-size 8000 --out books.model
  llama-jax pretrain experiments/tiny_end_to_end.py --data.sources "text:books/*.txt" --out runs/books
  llama-jax generate runs/books "Once upon a time" --temperature 0.6 --top-p 0.9
  llama-jax convert Llama-2-7b-hf llama2-7b --to ours
  llama-jax sft llama2-7b --data mine.jsonl --train lora --nf4 --out runs/mine
  llama-jax chat runs/mine
"""

# Failures of the system rather than of the code, and what to do about them.
_SYSTEM_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere with --out",
    errno.EDQUOT: "free some of your quota, or write elsewhere with --out",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "name a path on a file system that can be written, with --out",
    errno.ENOTDIR: "a part of the path is a file; name another path",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; `argv` is `sys.argv[1:]` unless given."""
    argv, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    return end_of(lambda: _dispatch(argv), debug)


def end_of(run: Callable[[], int | None], debug: bool = False) -> int:
    """Runs a program and returns its exit code, whichever way it ends; what it has to say about that goes to stderr.

    The experiments end through it as the verbs do, and both have the same share of a GPU's memory.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))  # read when jax finds a GPU
    try:
        code = run()
        sys.stdout.flush()  # here, so that a full disk or a reader that left is met inside the try
        return code or OK
    except SystemExit as error:  # the argument parser: 0 after --help, 2 after a message
        return error.code if isinstance(error.code, int) else OK if error.code is None else BUG
    except BrokenPipeError:
        _silence_stdout()
        return READER_GONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _tell_others(INTERRUPTED, "interrupted")
        return INTERRUPTED
    except Exception as error:
        code, message = _explain(error)
        if debug or message is None:
            import traceback

            traceback.print_exception(error)
        if message is not None:
            print(message, file=sys.stderr)
        if isinstance(error, OSError):
            _silence_stdout()
        if not isinstance(error, Preempted):  # which all processes agree on
            _tell_others(code, message or f"{type(error).__name__}: {error}", foreseen=message is not None)
        return code


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help", "help"):
        print(_help())
        return OK
    if argv and argv[0] == "--version":
        print(f"llama_jax {__version__}")
        return OK
    if not argv:
        raise UserError(f"no verb given; it is one of {', '.join(VERBS)} (llama-jax --help says what each does)")
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean `llama-jax {near[0]}`?" if near else f"it is one of {', '.join(VERBS)}"
        raise UserError(f"unknown verb {verb!r}; {hint}")
    module, _ = VERBS[verb]
    function = getattr(importlib.import_module(f"llama_jax.verbs.{module}"), verb.replace("-", "_"))
    return function(rest) or OK


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "usage: llama-jax VERB [arguments] [--debug]",
            "",
            "The Llama 2 paper in JAX, from raw text to a checkpoint that speaks.",
            "",
            *lines,
            "",
            "llama-jax VERB --help shows a verb's arguments and examples. --debug shows the traceback of any error.",
            "",
            "examples:",
            EXAMPLES,
            "exit codes: 0 done, 1 a bug, 2 bad input, 3 diverged, 42 preempted (start it again, it resumes)",
        ]
    )


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Takes --debug out wherever it stands; behind `--` it is text and stays."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [word for word in argv[:end] if word != "--debug"]
    return kept + argv[end:], len(kept) < end


def _explain(error: Exception) -> tuple[int, str | None]:
    """The exit code of an exception, and its message; no message marks a bug."""
    if isinstance(error, UserError):
        return BAD_INPUT, f"error: {error}"
    if isinstance(error, Diverged):
        return DIVERGED, f"diverged: {error}"
    if isinstance(error, Preempted):
        return PREEMPTED, f"preempted: {error}"
    # What is missing is a package of the environment, unless it is a part of this one.
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "llama_jax":
        return (
            BAD_INPUT,
            f"error: the Python package {error.name} is missing; {sys.executable} -m pip install -e . adds it",
        )
    if isinstance(error, OSError) and error.errno in _SYSTEM_REMEDIES:
        where = f" at {error.filename}" if error.filename else ""
        return BAD_INPUT, f"error: {os.strerror(error.errno)}{where}; {_SYSTEM_REMEDIES[error.errno]}"
    # By text, because importing jax to name its exception class would cost what this file saves.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        where = "the host's" if isinstance(error, MemoryError) else "the device's"
        remedy = "use smaller batches or a shorter context, or shard over more devices with --mesh"
        return (
            BAD_INPUT,
            f"error: this does not fit into {where} memory ({str(error)[:300] or 'out of memory'}); {remedy}",
        )
    return BUG, None


def _tell_others(code: int, message: str, *, foreseen: bool = True) -> None:
    """Ends this process at once where it is one of several, which would wait for it."""
    if distributed := sys.modules.get("llama_jax.parallel.distributed"):  # else there are no others
        sys.stdout.flush()
        distributed.fail(code, message, foreseen=foreseen)


def _silence_stdout() -> None:
    """Points stdout at nothing, so that what it still buffers does not raise again while Python shuts down."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass  # stdout was replaced by an object without a file descriptor; it buffers nothing


if __name__ == "__main__":
    sys.exit(main())
