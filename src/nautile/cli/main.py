"""The command ``nautile``: finds the verb, runs it, and turns what goes wrong into three lines and an exit code.

Only the chosen verb's module is imported, so that ``nautile --help`` answers without torch.
"""

import importlib
import os
import sys

from nautile.core.errors import NautileError, UserError
from nautile.core.nearest import suggestion

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("nautile.cli.demo", "the whole chain on this machine: data, tokenizer, pre-training, samples, report"),
    "pretrain": ("nautile.cli.pretrain", "train a model from scratch, or continue a run"),
    "data": ("nautile.cli.data", "turn text into packed token shards"),
    "tokenizer": ("nautile.cli.tokenizer", "train a tokenizer, or look at what one does to a text"),
    "generate": ("nautile.cli.generate", "continue prompts with a model"),
    "chat": ("nautile.cli.chat", "talk to a model in the terminal"),
    "check": ("nautile.cli.check", "whether a model folder holds what its config.json promises, from headers alone"),
    "convert": ("nautile.cli.convert", "a checkpoint in another dtype, or cut for DeepSeek's demo code"),
    "plan": ("nautile.cli.plan", "parameters, FLOPs, cache and memory of a model, before anything is allocated"),
    "guide": ("nautile.cli.guide", "each DeepSeek system: what it is, where it lives here, how to run it"),
    "bench": ("nautile.cli.bench", "kernels beside the roofline that the same run measured, and beside torch"),
    "ops": ("nautile.cli.ops", "every kernel, the backend that runs it here, and why faster ones do not"),
    "doctor": ("nautile.cli.doctor", "this machine, its versions, its measured speed, and a verdict"),
}
"""Verb → module with ``main(argv) -> int | None``, and one line about it."""

OPTIONS = ("--help", "-h", "--version")

EXAMPLES = ("nautile demo", "nautile pretrain v3-micro --train.steps 40 --out runs/first")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``nautile``; None for those of this process.

    Returns:
        0 when done, 1 after a failure, 2 after the caller's mistake, 130 after Ctrl-C.
    """
    _bound_spinning()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # a closed pipe shows here rather than in the interpreter's shutdown
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("NAUTILE_DEBUG") == "1":
            raise
        told = error if isinstance(error, NautileError) else _unforeseen(error)
        print(f"error: {told}", file=sys.stderr)
        return told.exit_code


def help_text() -> str:
    """What ``nautile --help`` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        "usage: nautile VERB [arguments]\n\n"
        "The DeepSeek stack in one package: models, training, inference.\n\n"
        f"verbs:\n{verbs}\n\n"
        f"examples:\n{examples}\n\n"
        "nautile VERB --help shows a verb's arguments; NAUTILE_DEBUG=1 shows tracebacks."
    )


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"nautile {version('nautile')}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        kind, known = ("option", OPTIONS) if verb.startswith("-") else ("verb", tuple(VERBS))
        raise UserError(f"unknown {kind} {verb!r}", "nautile has no such command", suggestion(verb, known, f"{kind}s"))
    module = importlib.import_module(VERBS[verb][0])
    try:
        return module.main(argv[1:]) or 0
    except SystemExit as ended:  # a verb's --help has been printed
        return int(ended.code or 0)


def _bound_spinning() -> None:
    """Let OpenMP threads spin only briefly at barriers, unless the user has decided; read when torch is imported.

    GNU OpenMP spins for milliseconds, which keeps a thread that it waits for off a busy core: with another program on
    two cores, training ran half as fast. Sleeping at once costs a third of the speed where the cores are free; 10,000
    turns cost neither (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _unforeseen(error: Exception) -> NautileError:
    lines = str(error).strip().splitlines() or [""]
    return NautileError(
        f"{type(error).__name__}: {lines[0]}".rstrip(": "),
        "nautile did not foresee this, so it may be a defect of ours",
        "run the same command with NAUTILE_DEBUG=1 to see where it happens",
    )
