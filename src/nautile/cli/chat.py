"""``nautile chat``: talk to a model in the terminal, or let a base model continue what you type."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from nautile.cli.flags import parse
from nautile.core.errors import UserError
from nautile.core.nearest import suggestion
from nautile.infer.params import SamplingParams

if TYPE_CHECKING:
    from nautile.infer.conversation import Conversation

EXAMPLES = ("nautile chat runs/demo", "nautile chat runs/demo --temperature 0 --max-tokens 64")

COMMANDS = {
    "/help": "show these commands",
    "/history": "show what was said so far",
    "/reset": "forget it",
    "/exit": "leave (or Ctrl-D)",
}


@dataclass(frozen=True)
class ChatArgs:
    """Whom to talk to, and how it answers."""

    model: tyro.conf.Positional[str]
    """A model folder or a run folder."""
    max_tokens: int = 128
    """Most tokens of one answer."""
    temperature: float = 0.7
    """0 takes the most likely token; higher is more varied."""
    top_p: float = 0.95
    """Sample from the most likely tokens whose probabilities sum to this."""
    seed: int | None = None
    """Seed of the sampling; without one, every conversation differs."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends an answer; may be given several times."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""


def main(argv: Sequence[str]) -> int:
    """Load the model and talk until the input ends."""
    description = "Talk to a model in the terminal. A base model continues your text."
    args = parse(ChatArgs, None, argv, "nautile chat", description, EXAMPLES)
    params = SamplingParams(args.max_tokens, args.temperature, args.top_p, args.seed, args.stop)

    import torch

    from nautile.infer.conversation import Conversation
    from nautile.infer.llm import LLM
    from nautile.models.io import model_folder
    from nautile.text.chat_template import ChatTemplate

    llm = LLM(args.model, dtype=getattr(torch, args.dtype))
    template = ChatTemplate.load(model_folder(args.model), llm.tokenizer) if llm.tokenizer else None
    conversation = Conversation(llm, params, template)
    if template is None:
        print(f"{args.model} is a base model without a chat template: it continues your text and answers nothing.")
    else:
        print(f"{args.model} answers through its chat template.")
    print("/help shows the commands; Ctrl-C ends an answer, Ctrl-D the conversation.\n")
    talk(conversation, _read_line())
    return 0


def talk(conversation: "Conversation", read_line: Callable[[], str]) -> None:
    """Read lines until ``/exit`` or the end of the input, and print the model's turns.

    Args:
        conversation: Remembers the turns.
        read_line: Returns a line without its end; raises EOFError after the last one.
    """
    while True:
        try:
            line = read_line()
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
    try:
        with closing(conversation.reply(line)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    print()


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
        return lambda: input()
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (its import is what gives `input` line editing)
    return lambda: input("> ")
