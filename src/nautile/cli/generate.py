"""``nautile generate``: continue a text, or fill the gap between two."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from nautile.cli.flags import parse
from nautile.cli.model_args import ModelArgs, open_llm, sampling_params
from nautile.core.errors import UserError

if TYPE_CHECKING:
    from nautile.infer.llm import LLM

EXAMPLES = (
    'nautile generate runs/demo "def fibonacci(n):" --max-tokens 64 --temperature 0.3',
    'nautile generate runs/demo --prefix "def add(a, b):" --suffix "    return total"',
)

MAX_TOKENS = 128
"""Length of a text where neither a flag nor the model says one."""


@dataclass(frozen=True)
class GenerateArgs(ModelArgs):
    """What to generate from, and how."""

    prompt: tyro.conf.Positional[str | None] = None
    """The text to continue; - reads it from standard input."""
    prefix: str | None = None
    """Fill in the middle: what stands before the gap."""
    suffix: str | None = None
    """Fill in the middle: what stands after it."""
    ignore_eos: bool = False
    """Go on after an end-of-sentence token."""
    stream: bool = True
    """Print pieces as they come, instead of the whole at the end."""


def main(argv: Sequence[str]) -> int:
    """Load, generate, print the new text on stdout."""
    description = "Continue a text with a model, or fill the gap between --prefix and --suffix."
    args = parse(GenerateArgs, None, argv, "nautile generate", description, EXAMPLES)
    args.check()
    _check_task(args)
    llm = open_llm(args)
    params = sampling_params(args, llm, MAX_TOKENS, args.ignore_eos)
    prompt = _prompt(args, llm)
    if args.stream:
        for piece in llm.stream(prompt, params):
            print(piece, end="", flush=True)
        print()
    else:
        print(llm.generate(prompt, params)[0].text)
    return 0


def _check_task(args: GenerateArgs) -> None:
    gap = args.prefix is not None or args.suffix is not None
    if gap and args.prompt is not None:
        raise UserError(
            "both a prompt and --prefix or --suffix were given",
            "a text is continued at its end or filled in the middle, not both",
            "leave one of them out",
        )
    if not gap and args.prompt is None:
        raise UserError(
            "there is nothing to continue",
            "neither a prompt nor --prefix and --suffix were given",
            f'nautile generate {args.model} "def add(a, b):"',
        )


def _prompt(args: GenerateArgs, llm: "LLM") -> str | list[int]:
    if args.prompt is None:
        return llm.middle_prompt(args.prefix or "", args.suffix or "")
    return _standard_input() if args.prompt == "-" else args.prompt


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is no UTF-8: byte 0x{error.object[error.start]:02X}",
            "models read Unicode text",
            "convert it: iconv -t UTF-8",
        ) from error
