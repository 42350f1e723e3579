"""``nautile chat``: talk to a model in the terminal, or let a base model continue what you type."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nautile.cli.flags import parse
from nautile.cli.model_args import ModelArgs, open_llm, sampling_params
from nautile.core.errors import UserError
from nautile.core.log import warn
from nautile.core.nearest import suggestion
from nautile.infer.defaults import ANSWER_TOKENS

if TYPE_CHECKING:
    from nautile.infer.conversation import Conversation
    from nautile.text.thinking import Piece

EXAMPLES = (
    "nautile chat runs/demo",
    "nautile chat runs/demo --temperature 0 --max-tokens 64",
    "nautile chat DeepSeek-V3.1 --thinking on",
)

BASE_TOKENS = 128
"""Length of a base model's turn, which never comes to an end, where neither a flag nor the model says one."""

COMMANDS = {
    "/help": "show these commands",
    "/history": "show what was said so far",
    "/reset": "forget it",
    "/exit": "leave (or Ctrl-D)",
}


@dataclass(frozen=True)
class ChatArgs(ModelArgs):
    """Whom to talk to, and how it answers."""

    chat_template: str | None = None
    """Name of a built-in chat template to use instead of the model's own: v2, v3, r1, v3.1, v3.2, coder, ..."""
    thinking: Literal["on", "off", "auto"] = "auto"
    """Ask for answers with reasoning or without, where the model knows both ways; auto is the template's own way."""


def main(argv: Sequence[str]) -> int:
    """Load the model and talk until the input ends."""
    description = "Talk to a model in the terminal. A base model continues your text."
    args = parse(ChatArgs, None, argv, "nautile chat", description, EXAMPLES)
    args.check()

    from nautile.infer.conversation import Conversation

    llm = open_llm(args, args.chat_template)
    length = BASE_TOKENS if llm.template is None else ANSWER_TOKENS
    thinking = {"on": True, "off": False, "auto": None}[args.thinking]
    params = sampling_params(args, llm, length)
    conversation = Conversation(llm, params, thinking)
    if llm.template is None:
        if thinking is not None:
            raise UserError(
                f"--thinking {args.thinking} is for models that answer",
                f"{args.model} is a base model without a chat template",
                "leave it out, or name a template with --chat-template",
            )
        _tell(f"{args.model} is a base model without a chat template: it continues your text and answers nothing.")
    else:
        if thinking is not None:  # a way of answering that it lacks is told at once
            llm.chat_prompt([{"role": "user", "content": "Hello"}], thinking=thinking)
        _tell(f"{args.model} answers through {llm.template.origin}.")
    _tell("/help shows the commands; Ctrl-C ends an answer, Ctrl-D the conversation.\n")
    talk(conversation, _read_line())
    return 0


def talk(conversation: "Conversation", read_line: Callable[[], str]) -> None:
    """Read lines until ``/exit`` or the end of the input, and print the model's turns.

    Args:
        conversation: Remembers the turns.
        read_line: Returns a line without its end, bytes that are no UTF-8 as lone surrogates; raises EOFError after
            the last one.
    """
    while True:
        try:
            line = read_line()
        except UnicodeDecodeError as error:
            print(f"error: {_not_utf8(error.start, error.object[error.start])}", file=sys.stderr)
            continue
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves.")
            continue
        if line.strip() == "/exit":
            return
        if line.startswith("/"):
            _command(line.strip(), conversation)
        elif line.strip():
            _answer(conversation, line)


def _answer(conversation: "Conversation", line: str) -> None:
    shown = Shown()
    try:
        _check_line(line)
        with closing(conversation.reply(line)) as pieces:
            for piece in pieces:
                shown.add(piece)
    except KeyboardInterrupt:
        print(" …", end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        if shown.last_was_reasoning:
            print()
            warn("the answer ended while still reasoning; --max-tokens lets it go on for longer")
            return
    print()


def _check_line(line: str) -> None:
    for at, character in enumerate(line):
        if "\ud800" <= character <= "\udfff":
            raise _not_utf8(len(line[:at].encode()), ord(character) & 0xFF)


def _not_utf8(start: int, byte: int) -> UserError:
    return UserError(
        f"byte {start + 1} of the line, 0x{byte:02X}, is no UTF-8",
        "models read Unicode text",
        "set the terminal to UTF-8, or convert the text: iconv -t UTF-8",
    )


def _tell(message: str) -> None:
    """Print what is for the person who talks; where stdout is a pipe, only answers go there."""
    print(message, file=sys.stdout if sys.stdout.isatty() else sys.stderr)


class Shown:
    """Prints an answer's pieces as they come: reasoning is dim on a terminal, and marked in a pipe."""

    def __init__(self) -> None:
        self.last_was_reasoning: bool | None = None

    def add(self, piece: "Piece") -> None:
        """Print one more piece."""
        turns = piece.reasoning != self.last_was_reasoning
        terminal = sys.stdout.isatty()
        if turns and not terminal and (piece.reasoning or self.last_was_reasoning):
            print("[thinking] " if piece.reasoning else "\n[answer] ", end="")
        elif turns and self.last_was_reasoning:
            print("\n")
        self.last_was_reasoning = piece.reasoning
        if piece.reasoning and terminal:
            _print_dim(piece.text)
        else:
            print(piece.text, end="", flush=True)


def _print_dim(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, markup=False, emoji=False).print(text, style="dim", end="", soft_wrap=True)


def _command(word: str, conversation: "Conversation") -> None:
    if word == "/help":
        print("\n".join(f"  {command:<10}{meaning}" for command, meaning in COMMANDS.items()))
    elif word == "/history":
        print("\n".join(f"[{turn.role}] {turn.content}" for turn in conversation.turns) or "nothing was said yet")
    elif word == "/reset":
        conversation.reset()
        print("forgotten")
    else:
        print(f"no such command: {word}; {suggestion(word, COMMANDS, 'commands')}")


def _read_line() -> Callable[[], str]:
    """Asks with a prompt, line editing and arrow keys on a terminal; reads silently from a pipe."""
    if not sys.stdin.isatty():
        return _piped_line
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (its import is what gives `input` line editing)
    return lambda: input("> ")


def _piped_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8", "surrogateescape").rstrip("\r\n")
