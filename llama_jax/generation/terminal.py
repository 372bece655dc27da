"""A conversation in the terminal, or on a pipe: a message a line in, the answers and nothing else out on stdout.

Whoever types gets a prompt, line editing, a status line and messages, all but the answers on stderr; a mistake is
reported and the conversation goes on. On a pipe it ends the conversation, as no one is there to correct it.
"""

import sys
import time
from collections.abc import Iterator

from llama_jax.errors import UserError
from llama_jax.generation.session import Chat

HELP = """\
/system TEXT   put TEXT before the conversation, from the next answer on; /system alone takes it away
/reset         begin anew; the system prompt stays
/regen         another answer to the last message
/save FILE     write the conversation as JSON
/load FILE     go on with a saved conversation
/help          this list
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer, and at the prompt leaves
Anything else is a message; one that begins with a slash is written with two."""


def converse(chat: Chat) -> None:
    """Answers what stdin says until it ends or /exit.

    Raises:
      KeyboardInterrupt: Ctrl-C at the prompt; on a pipe, at any time.
      UserError: on a pipe, the first message or command that cannot be served, by its line.
    """
    is_typed = sys.stdin.isatty()
    for number, line in enumerate(_typed() if is_typed else _piped(), start=1):
        if line.strip() == "/exit":
            return
        forgotten_before = chat.forgotten
        try:
            _serve(chat, line, is_typed)
        except UserError as error:
            if not is_typed:
                raise UserError(f"line {number} of the input: {error}") from error
            _say(f"error: {error}")
        except KeyboardInterrupt:
            if not is_typed:
                raise
            print(flush=True)  # behind what was said of the answer
            _say("stopped; what was said stays in the conversation")
        if chat.forgotten > forgotten_before:
            turns = sum(message.role == "user" for message in chat.history)
            _say(f"the context is full: of {turns} turns the model no longer sees the oldest {chat.forgotten}")


def _typed() -> Iterator[str]:
    """Lines as they are typed, until Ctrl-D, edited and remembered by readline where Python has it."""
    try:
        import readline  # noqa: F401 (`input` uses it once it is imported)
    except ImportError:
        pass  # as on Windows: lines are then edited as the terminal itself does
    _say("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:
                print("> ", end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            _say("")  # the shell's prompt gets a line of its own
            return
        except UnicodeDecodeError:
            _say("error: this line is not UTF-8; set the terminal to it")


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of the input is not UTF-8 ({error.reason}); expected UTF-8 text") from None


def _serve(chat: Chat, line: str, is_typed: bool) -> None:
    """Does what a line asks for. Raises UserError."""
    if not line.startswith("/") or line.startswith("//"):
        if line.strip():
            _answer(chat, chat.stream(line[line.startswith("//") :]), is_typed)
        return
    command, _, rest = line.strip().partition(" ")
    match command, rest.strip():
        case "/system", text:
            chat.system = text
            _say("system prompt: " + (text or "none"))
        case "/reset", "":
            chat.reset()
            _say("a new conversation")
        case "/regen", "":
            _answer(chat, chat.stream_again(), is_typed)
        case "/save" | "/load", "":
            raise UserError(f"{command} needs a file: {command} talk.json")
        case "/save", path:
            chat.save(path)
            _say(f"saved to {path}")
        case "/load", path:
            chat.load(path)
            _say(f"loaded {len(chat.history)} messages from {path}")
        case "/help", "":
            _say(HELP)
        case "/reset" | "/regen" | "/help" | "/exit", text:
            raise UserError(f"{command} takes nothing after it, found {text!r}")
        case _:
            raise UserError(f"unknown command {command}; /help lists them, and // begins a message with a slash")


def _answer(chat: Chat, pieces: Iterator[str], is_typed: bool) -> None:
    """Prints an answer as it comes, and behind it what it took."""
    begun, first, answer = time.perf_counter(), None, ""
    for piece in pieces:
        first = first or time.perf_counter()
        answer += piece
        print(piece, end="", flush=True)
    ended = time.perf_counter()
    print(flush=True)
    if is_typed and sys.stderr.isatty():
        _say(_status(chat, answer, (first or ended) - begun, ended - (first or ended)))


def _status(chat: Chat, answer: str, waited: float, took: float) -> str:
    """One line of how long the first token and the others took, in seconds, and how full the context is."""
    tokens = len(chat.llama.tokenizer.encode(answer, bos=False))
    speed = f"{(tokens - 1) / took:.0f} tok/s · " if tokens > 1 and took > 0 else ""
    used, available = chat.context
    return f"ttft {waited:.2f} s · {speed}context {used}/{available}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
