"""The recipe of a pre-training run: every number that shapes it, in one frozen tree.

Precedence: the defaults below < the YAML recipe < a flag (``--train.steps 40``). Nothing here imports torch, so a wrong
recipe is refused at once. Defaults that DeepSeek-V3 published (arXiv 2412.19437, §4.2) are V3's; sizes are small.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nautile.core.config import difference, from_mapping, load_yaml, nearest, to_mapping
from nautile.core.errors import UserError
from nautile.data.config import DataConfig
from nautile.models.deepseek_v3 import config as v3
from nautile.models.deepseek_v3.config import DeepseekV3Config
from nautile.models.deepseek_v32 import config as v32
from nautile.models.deepseek_v32.config import DeepseekV32Config
from nautile.text.config import TokenizerConfig
from nautile.train.rules import rules

PRESETS = {"model": {**v3.PRESETS, **v32.PRESETS}}
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and gradient clipping."""

    lr: float = 2.2e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of its square."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (norm gains and other vectors are left alone)."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run. Places are fractions of train.steps, so a shorter run keeps the shape."""

    kind: Literal["constant-cosine", "multi-step"] = "constant-cosine"
    """constant-cosine is DeepSeek-V3's, multi-step is DeepSeekMoE's and V2's."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0 to the peak."""
    constant_until: float = 0.676
    """constant-cosine: end of the peak (V3: 10 of 14.8 trillion tokens)."""
    cosine_until: float = 0.966
    """constant-cosine: end of the cosine (V3: 14.3 of 14.8)."""
    floor: float = 0.1
    """constant-cosine: learning rate after the cosine, as a fraction of the peak (V3: 2.2e-5)."""
    floor_until: float = 0.9887
    """constant-cosine: end of that constant stretch (V3: 333 billion tokens long)."""
    final: float = 0.0332
    """constant-cosine: learning rate of the rest, as a fraction of the peak (V3: 7.3e-6)."""
    decay_at: tuple[float, ...] = (0.6, 0.9)
    """multi-step: where the rate is multiplied by decay_factor (V2: 0.6, 0.9; DeepSeekMoE: 0.8, 0.9)."""
    decay_factor: float = 0.316
    """multi-step: the factor, about the square root of 0.1."""


@dataclass(frozen=True)
class MtpConfig:
    """Weight λ of the multi-token-prediction loss. model.num_nextn_predict_layers: 0 switches it off."""

    weight: float = 0.3
    """λ for most of the run."""
    final_weight: float = 0.1
    """λ afterwards."""
    switch_at: float = 0.676
    """Where λ changes, as a fraction of train.steps (V3: 10 of 14.8 trillion tokens)."""


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load of the experts even, beside the balance loss, whose weight is `model.aux_loss_alpha`."""

    bias_speed: float = 0.001
    """γ: what an expert's selection bias gains or loses per step; 0 switches the bias update off."""
    bias_until: float = 0.966
    """γ is 0 after this fraction of train.steps (V3: 14.3 of 14.8 trillion tokens)."""


@dataclass(frozen=True)
class IndexerConfig:
    """Training of a V3.2 model's indexers in up to three stretches (V3.2-Exp §2.1.1). Without indexers of no meaning.

    First attention reads everything and the indexers rest, as V3 trains. Then all but the indexers is frozen, and they
    learn how attention reads everything. From there on attention reads what they select, everything is trained, and
    they learn how that is read.
    """

    dense_until: float = 0.0
    """End of the first stretch, as a fraction of train.steps."""
    warmup_until: float = 0.0
    """End of the second one (V3.2: 1000 steps of 2.1 billion tokens in all)."""
    warmup_lr: float = 1e-3
    """Learning rate of the second one, constant (V3.2: 1e-3)."""
    weight: float = 1.0
    """ω: factor on the indexers' loss. Their gradient is clipped apart from the rest, so ω weighs only below there."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of the run."""

    steps: int = 1000
    """Optimiser steps of the whole run; schedules are laid over this length."""
    stop_after: int | None = None
    """Stop once this many steps are done, leaving the schedules as they are; --resume continues."""
    batch_size: int = 16
    """Sequences per optimiser step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass, a divisor of batch_size; the gradients add up. None: the whole batch at once."""
    sequence_length: int = 512
    """Tokens per sequence."""
    separate_documents: bool = False
    """Keep attention inside each packed document. V3 trains without this mask."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """fp32, bf16 autocast with float32 master weights, or that with the blocks' projections and experts in FP8 as V3
    trained (GPUs from compute capability 8.9 on; elsewhere emulated). auto takes fp32 or bf16 and says why."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA if there is any."""
    threads: int | None = None
    """CPU threads; null takes one per core. The number is recorded: sums split otherwise round otherwise."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = 100
    """Steps between two validations; the end of the run always validates."""
    validation_tokens: int = 65536
    """Held-out tokens scored by each validation during the run."""
    final_validation_tokens: int = 1_000_000
    """Held-out tokens scored by the last validation, which summary.json reports."""
    sample_every: int = 200
    """Steps between two rounds of sample texts; the end of the run always samples."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; the end of the run and an interruption always write one."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """A pre-training run of a DeepSeek-V3 or V3.2 model."""

    name: str = "pretrain"
    """Name of the run; its folder is runs/NAME unless --out says otherwise."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    start: str | None = None
    """Folder or Hub name of a model whose weights the run starts from, with tokenizer.path its tokenizer; null for
    random weights. A V3.2 model may start from a V3 of the same shape."""
    model: DeepseekV3Config | DeepseekV32Config
    """Shape of the model; `preset: v3-micro` starts from a named one."""
    tokenizer: TokenizerConfig
    """Tokenizer to train on the corpus, or an existing one."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run."""
    mtp: MtpConfig = field(default_factory=MtpConfig)
    """Multi-token prediction."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Expert load."""
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    """Indexers of a V3.2 model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, bookkeeping."""

    def check(self) -> None:
        """Raise `UserError` where two fields contradict each other. Needs no torch."""
        self.model.check()
        self.tokenizer.check()
        self.data.check()
        for holds, what, why, cure in rules(self):
            if not holds:
                raise UserError(what, why, cure)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with nautile."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, object] | None = None) -> PretrainRecipe:
    """Read a shipped recipe by name or a YAML file by path, apply overrides, and check the result.

    Args:
        name_or_path: ``v3-micro``, or a path to a .yaml file (a run's config.yaml is one).
        overrides: Dotted field → value, ``{"train.steps": 40}``.

    Raises:
        UserError: unknown name (with the nearest one), unknown key, wrong type, contradiction.
    """
    recipe = load_yaml(PretrainRecipe, recipe_path(name_or_path), presets=PRESETS)
    if overrides:
        recipe = from_mapping(PretrainRecipe, _overridden(to_mapping(recipe), overrides), where="override")
    recipe.check()
    return recipe


def recorded_recipe(path: Path) -> PretrainRecipe:
    """The recipe in a run's config.yaml, unchecked: files that it names may have moved since the run began.

    Raises:
        UserError: unknown key, wrong type.
    """
    return load_yaml(PretrainRecipe, path, presets=PRESETS)


def _overridden(values: dict[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    for dotted, value in overrides.items():
        *sections, field_name = dotted.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[field_name] = value
    return values


def recipe_path(name_or_path: str) -> Path:
    """The file behind a recipe's name or path."""
    shipped = RECIPES / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if path.is_file():
            return path
        raise UserError(f"{path}: no such recipe file", "a path was given, not a shipped name", "check the path")
    near = nearest(name_or_path, shipped_recipes())
    raise UserError(
        f"no recipe is called {name_or_path!r}",
        f"shipped recipes: {', '.join(shipped_recipes())}; a file must end in .yaml",
        f"nautile pretrain {near or shipped_recipes()[0]}",
    )


MAY_CHANGE_ON_RESUME = (
    "name",
    "data.cache",
    "train.stop_after",
    "train.device",
    "train.log_every",
    "train.validate_every",
    "train.validation_tokens",
    "train.final_validation_tokens",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)
"""Fields that do not touch the sequence of weights; every other one makes it a different run."""


def conflicts(recorded: PretrainRecipe, asked: PretrainRecipe) -> list[str]:
    """Differences that forbid continuing the recorded run as the asked one, as lines ``train.steps: 40 → 60``."""
    allowed = set(MAY_CHANGE_ON_RESUME)
    if recorded.tokenizer.path and asked.tokenizer.path:
        allowed.add("tokenizer.path")  # a tokenizer may move; its content is part of the data's fingerprint
    return [line for line in difference(recorded, asked) if line.split(":")[0] not in allowed]
