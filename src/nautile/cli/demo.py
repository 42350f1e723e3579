"""``nautile demo``: the whole chain on real text in a few minutes, from raw files to a model that answers."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nautile.cli import flags
from nautile.core.errors import UserError
from nautile.core.log import log
from nautile.core.run_folder import RunFolder
from nautile.train.recipe import PretrainRecipe, load_recipe

if TYPE_CHECKING:
    from nautile.data.prepare import PreparedData
    from nautile.models.causal_lm import CausalLM

EXAMPLES = ("nautile demo", "nautile demo --seconds 600 --out runs/long-demo")

PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file as a list."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
"""Beginnings that the model continues at the end."""

FEWEST_STEPS, MOST_STEPS = 40, 4000
MOST_CHARACTERS = 1000
"""Around the hole to fill: lines can be long, and even one token per character must fit into the context of 1,024."""


@dataclass(frozen=True)
class Arguments:
    """What may stand after ``nautile demo``."""

    out: Path = Path("runs/demo")
    """Folder of the run. A finished demo there is shown again, an interrupted one continues."""
    seconds: float = 200.0
    """Time for pre-training; the number of steps is measured to fit. The other stages take less than a minute."""
    text: tuple[Path, ...] = ()
    """Your own files or folders to learn from, instead of the Python standard library."""


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    description = (
        "The whole chain on this machine: prepare text, train a tokenizer, pre-train a small DeepSeek-V3 (latent "
        "attention, experts, multi-token prediction, bias balancing), validate, complete code, write a report. "
        "Nothing is downloaded: the default text is the Python standard library that is already here."
    )
    return run(flags.parse(Arguments, None, argv, "nautile demo", description, EXAMPLES))


def run(args: Arguments) -> int:
    """Each stage says what it does or reuses."""
    if args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g}", "pre-training needs some time", "nautile demo --seconds 200")
    started = time.perf_counter()
    resume = (args.out / "config.yaml").exists()
    recipe = recorded(args) if resume else demo_recipe(args)

    from nautile.data.prepare import prepare
    from nautile.train.pretrain import pretrain

    log("[1/4] text to tokens")
    data = prepare(recipe.data, recipe.tokenizer)

    log("[2/4] pre-training")
    if resume:
        log(f"{args.out} holds this demo already: continuing or reusing it, with its {recipe.train.steps} steps")
        log(f"to start afresh: nautile demo --out {args.out}-2, or delete {args.out}")
        folder = RunFolder.open(args.out)
    else:
        recipe = fit_into(args.seconds, recipe, data)
        folder = RunFolder.create(args.out)
    summary = pretrain(recipe, folder, data, sampler(data), resume=resume)
    if summary["stopped_by"]:
        log(f"stopped by {summary['stopped_by']}; continue with: nautile demo --out {args.out}")
        return 128 + signal.Signals[summary["stopped_by"]]

    log("[3/4] code that it never saw")
    for sample in folder.samples.read():
        if sample["step"] == summary["step"]:
            show(sample)

    log("[4/4] report")
    from nautile.train.report import render

    page = render(folder)
    ratio = summary["val_bits_per_byte"] / summary["bigram_bits_per_byte"]
    log(
        f"\n{summary['val_bits_per_byte']:.3f} bits per byte on text it never saw: {ratio:.2f} × a bigram model's "
        f"{summary['bigram_bits_per_byte']:.3f} (unigram {summary['unigram_bits_per_byte']:.3f}); "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {time.perf_counter() - started:.0f} s in all"
    )
    log(f"report: {page}")
    for command in next_commands(args.out):
        log(f"next: {command}")
    return 0


def demo_recipe(args: Arguments) -> PretrainRecipe:
    """The recipe v3-micro, over the user's own text if some is named."""
    overrides: dict[str, object] = {"name": "demo"}
    if args.text:
        overrides |= {"data.source": "files", "data.paths": [str(path) for path in args.text]}
    return load_recipe("v3-micro", overrides)


def recorded(args: Arguments) -> PretrainRecipe:
    """The recipe of the demo in `args.out`, if it is about the same text."""
    recipe = load_recipe(str(args.out / "config.yaml"))
    asked = demo_recipe(args).data
    if (recipe.data.source, recipe.data.paths) != (asked.source, asked.paths):
        raise UserError(
            f"{args.out} holds a demo over other text ({recipe.data.source} {' '.join(recipe.data.paths)})".rstrip(),
            "its tokenizer and model belong to that text",
            f"nautile demo --out {args.out}-2, or delete {args.out}",
        )
    return recipe


def fit_into(seconds: float, recipe: PretrainRecipe, data: "PreparedData") -> PretrainRecipe:
    """The recipe with as many steps as this machine does in the time given."""
    from nautile.train.budget import fastest_threads, steps_within

    threads, each, why = fastest_threads(recipe, data)
    steps = steps_within(seconds, each, FEWEST_STEPS, MOST_STEPS)
    log(f"CPU threads {threads}: {why}")
    log(f"{steps} steps: what fits into {seconds:g} s (--seconds)")
    warmup = min(recipe.schedule.warmup_steps, steps // 10)
    return replace(
        recipe,
        train=replace(recipe.train, steps=steps, threads=threads),
        schedule=replace(recipe.schedule, warmup_steps=warmup),
    )


def sampler(data: "PreparedData") -> "Callable[[CausalLM], list[dict[str, Any]]]":
    """What the model writes on the way and at the end: code continued, and a line of a held-out file filled in."""
    hole = find_hole(data)

    def sample(model: "CausalLM") -> list[dict[str, Any]]:
        from nautile.infer.llm import LLM
        from nautile.infer.params import SamplingParams

        llm = LLM(model, tokenizer=data.tokenizer)
        params = SamplingParams(max_tokens=72, temperature=0.5, top_p=0.9, seed=0)
        outputs = llm.generate(list(PROMPTS), params)
        samples: list[dict[str, Any]] = [{"prompt": p, "text": o.text} for p, o in zip(PROMPTS, outputs, strict=True)]
        if hole is not None:
            name, prefix, middle, suffix = hole
            filled = llm.complete_middle(prefix, suffix, replace(params, max_tokens=40, stop=("\n",)))
            samples.append({"prompt": prefix, "text": filled.text, "suffix": suffix, "truth": middle, "source": name})
        return samples

    return sample


def find_hole(data: "PreparedData", around: int = 6) -> tuple[str, str, str, str] | None:
    """(document, lines before, one line, lines after) from held-out text; None if no document is long enough."""
    for name, text in data.read_validation_texts(40):
        lines = text.splitlines(keepends=True)
        for at in range(around, len(lines) - around):
            line = lines[at].strip()
            if 12 <= len(line) <= 60 and line.startswith(("return ", "self.", "if ", "for ")):
                indent = len(lines[at]) - len(lines[at].lstrip())
                prefix = "".join(lines[at - around : at]) + lines[at][:indent]
                suffix = "\n" + "".join(lines[at + 1 : at + 1 + around])
                if len(prefix) + len(suffix) <= MOST_CHARACTERS:
                    return name, prefix, lines[at][indent:].rstrip("\n"), suffix
    return None


def show(sample: dict[str, Any]) -> None:
    """One sample on stdout, what the model wrote set apart."""
    print(f"--- {sample.get('source', 'a function to complete')}")
    print(f"{sample['prompt']}⟦{sample['text']}⟧{sample.get('suffix', '')}", flush=True)
    if "truth" in sample:
        print(f"--- in the file: {sample['truth']}", flush=True)


def next_commands(out: Path) -> list[str]:
    """What one may type now."""
    return [
        f"nautile generate {out} 'def mean(values):'",
        f"nautile chat {out}",
        "nautile pretrain v3-micro --train.steps 2000 --out runs/longer",
        "nautile guide",
    ]
