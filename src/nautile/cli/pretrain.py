"""``nautile pretrain``: train a model from scratch, or continue a run."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nautile.cli import flags
from nautile.core.errors import UserError
from nautile.core.log import log
from nautile.core.run_folder import RunFolder
from nautile.train.ranks import one_rank_only
from nautile.train.recipe import PretrainRecipe, load_recipe, recorded_recipe, shipped_recipes

if TYPE_CHECKING:
    from nautile.data.prepare import PreparedData
    from nautile.models.causal_lm import CausalLM

EXAMPLES = (
    "nautile pretrain v3-micro --train.steps 40 --out runs/first",
    "nautile pretrain my-recipe.yaml --data.source files --data.paths texts/",
    "nautile pretrain --resume runs/first",
)


@dataclass(frozen=True)
class Arguments:
    """What may stand after ``nautile pretrain RECIPE``."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; if not given, runs/NAME, or runs/NAME-2 and so on where that is taken."""
    resume: Path | None = None
    """Continue the run in this folder exactly, from its newest checkpoint. Its config.yaml stands for RECIPE."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code is 0, or 128 + the signal that interrupted training (130 for Ctrl-C)."""
    return run(parse(argv))


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments over the defaults of the recipe that they name.

    Raises:
        UserError: no recipe, an unknown one, or flags that contradict each other.
    """
    named = flags.first_word(argv)
    resume = _value_of("--resume", argv)
    if named:
        recipe = load_recipe(named)
    elif resume:
        recipe = recorded_recipe(RunFolder.open(resume).config_path)
    elif {"-h", "--help"} & set(argv):
        recipe = load_recipe("v3-micro")
    else:
        raise UserError(
            "no recipe is given",
            f"shipped recipes: {', '.join(shipped_recipes())}; a path to a .yaml file is one, too",
            EXAMPLES[0],
        )
    arguments = flags.parse(
        Arguments,
        Arguments(recipe),
        argv[1:] if named else argv,
        prog="nautile pretrain RECIPE",
        description=(
            f"Pre-train a model. RECIPE is one of {', '.join(shipped_recipes())}, or a YAML file. The defaults below "
            f"are those of {named or resume or 'v3-micro'}."
        ),
        examples=EXAMPLES,
    )
    arguments.recipe.check()
    if arguments.out and arguments.resume:
        raise UserError(
            f"--out {arguments.out} together with --resume {arguments.resume}",
            "a resumed run stays in its folder",
            "leave one of them out",
        )
    return arguments


def run(args: Arguments) -> int:
    """Prepare the data, train, and write the report."""
    one_rank_only()
    recipe = args.recipe
    if args.resume:
        folder = RunFolder.open(args.resume)
    else:
        folder = RunFolder.create(args.out or free_folder(Path("runs") / recipe.name))

    from nautile.data.prepare import prepare
    from nautile.train.begin import as_recorded
    from nautile.train.pretrain import pretrain
    from nautile.train.report import render

    if args.resume:
        recipe = as_recorded(recipe, folder)  # another corpus is refused before it is prepared
    data = prepare(recipe.data, recipe.tokenizer)
    summary = pretrain(recipe, folder, data, held_out_sampler(data), resume=args.resume is not None)
    if summary["step"]:
        log(f"report: {render(folder)}")
    for command in summary["next"]:
        log(f"next: {command}")
    stopped_by = summary["stopped_by"] or ""
    return 128 + signal.Signals[stopped_by] if stopped_by.startswith("SIG") else 0


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that holds no run yet, said aloud."""
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10_000))]
    folder = next(path for path in names if not (path / "config.yaml").exists())
    if folder != wanted:
        log(f"{wanted} holds a run already (--resume {wanted} would continue it): this one goes to {folder}")
    return folder


def held_out_sampler(
    data: "PreparedData", texts: int = 3, max_tokens: int = 64
) -> "Callable[[CausalLM], list[dict[str, Any]]]":
    """A sampler that continues held-out documents from their middle: text that the model never saw."""

    def sample(model: "CausalLM") -> list[dict[str, Any]]:
        from nautile.infer.llm import LLM
        from nautile.infer.params import SamplingParams

        llm = LLM(model, tokenizer=data.tokenizer)
        each = [SamplingParams(max_tokens, temperature=0.7, top_p=0.95, seed=i) for i in range(len(openings))]
        room = llm.config.max_position_embeddings // 2  # the other half is for the answer
        prompts = [[data.tokenizer.bos_id, *ids][:room] for ids in openings]
        outputs = llm.generate(prompts, each)
        shown = [data.tokenizer.decode(prompt) for prompt in prompts]
        return [{"prompt": p, "text": o.text} for p, o in zip(shown, outputs, strict=True)]

    openings = data.tokenizer.encode_batch([_opening(text) for _, text in data.read_validation_texts(texts)])
    return sample


def _opening(text: str, characters: int = 240) -> str:
    """Some whole lines from the middle of a text, so that licence headers do not fill every prompt."""
    middle = text[len(text) // 3 :][: characters * 2]
    lines = middle.split("\n")[1:] or [middle]
    kept = ""
    for line in lines:
        if kept and len(kept) + len(line) > characters:
            break
        kept += line[:characters] + "\n"
    return kept


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The value of a flag that must be known before the flags can be read."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
