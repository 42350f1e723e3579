"""``nautile generate``: continue a text, or fill the gap between two."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from nautile.cli.flags import parse
from nautile.core.errors import UserError
from nautile.infer.params import SamplingParams

if TYPE_CHECKING:
    from nautile.infer.llm import LLM

EXAMPLES = (
    'nautile generate runs/demo "def fibonacci(n):" --max-tokens 64 --temperature 0.3',
    'nautile generate runs/demo --prefix "def add(a, b):" --suffix "    return total"',
)


@dataclass(frozen=True)
class GenerateArgs:
    """What to generate from, and how."""

    model: tyro.conf.Positional[str]
    """A model folder or a run folder."""
    prompt: tyro.conf.Positional[str | None] = None
    """The text to continue; - reads it from standard input."""
    prefix: str | None = None
    """Fill in the middle: what stands before the gap."""
    suffix: str | None = None
    """Fill in the middle: what stands after it."""
    max_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.7
    """0 takes the most likely token; higher is more varied."""
    top_p: float = 0.95
    """Sample from the most likely tokens whose probabilities sum to this."""
    seed: int | None = None
    """Seed of the sampling; without one, every call differs."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the text; may be given several times."""
    ignore_eos: bool = False
    """Go on after the end-of-sentence token."""
    stream: bool = True
    """Print pieces as they come, instead of the whole at the end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""


def main(argv: Sequence[str]) -> int:
    """Load, generate, print the new text on stdout."""
    description = "Continue a text with a model, or fill the gap between --prefix and --suffix."
    args = parse(GenerateArgs, None, argv, "nautile generate", description, EXAMPLES)
    params = SamplingParams(
        args.max_tokens, args.temperature, args.top_p, args.seed, args.stop, ignore_eos=args.ignore_eos
    )
    _check_task(args)

    import torch

    from nautile.infer.llm import LLM

    llm = LLM(args.model, dtype=getattr(torch, args.dtype))
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
    return sys.stdin.read() if args.prompt == "-" else args.prompt
