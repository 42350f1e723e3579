import random
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from nautile.core.run_folder import RunFolder
from nautile.data.config import DataConfig
from nautile.data.prepare import prepare
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.text.config import TokenizerConfig
from nautile.train.pretrain import pretrain
from nautile.train.recipe import BalanceConfig, OptimConfig, PretrainRecipe, ScheduleConfig, TrainConfig

VOCAB = 300


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Some forty small files of made-up code."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(40):
        names = draw.sample(["alpha", "beta", "gamma", "delta", "mean", "total", "count", "items"], 4)
        lines = [f"def {a}({b}):\n    return {b} + {draw.randint(0, 99)}\n" for a in names for b in names]
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def recipe(corpus, tmp_path_factory):
    """A run of eight steps in which everything happens; about a second."""
    return PretrainRecipe(
        name="tiny",
        model=replace(V3_NANO, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=64),
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        data=DataConfig(
            source="files", paths=(str(corpus),), validation_fraction=0.2, cache=str(tmp_path_factory.mktemp("cache"))
        ),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        balance=BalanceConfig(bias_speed=0.01),
        train=TrainConfig(
            steps=8,
            batch_size=4,
            micro_batch_size=2,
            sequence_length=32,
            precision="fp32",
            device="cpu",
            log_every=1,
            validate_every=4,
            validation_tokens=128,
            final_validation_tokens=256,
            sample_every=4,
            checkpoint_every=3,
        ),
    )


@pytest.fixture(scope="session")
def data(recipe):
    return prepare(recipe.data, recipe.tokenizer)


@pytest.fixture(autouse=True)
def no_peak_measurement(monkeypatch):
    """Half a second per run that no test looks at."""
    monkeypatch.setattr("nautile.train.begin.measure_gemm_peak", lambda dtype: 100.0)


@pytest.fixture(scope="session")
def straight(recipe, data, tmp_path_factory):
    """The run of eight steps, never interrupted."""
    run = RunFolder.create(tmp_path_factory.mktemp("straight") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nautile.train.begin.measure_gemm_peak", lambda dtype: 100.0)
        pretrain(recipe, run, data, sample=lambda model: [{"prompt": "def", "text": " mean():"}])
    return run


TIMES = {"tokens_per_second", "gflops"}


def weights(run):
    """Name → tensor of the exported model."""
    return {name: t for file in sorted(run.model.glob("*.safetensors")) for name, t in load_file(file).items()}


def figures(run):
    """The lines of metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in run.read_metrics()]


@pytest.fixture(scope="session")
def assert_same_run():
    """Both runs recorded the same numbers and ended with the same weights, bit for bit."""

    def check(one, other):
        assert figures(one) == figures(other)
        ours, theirs = weights(one), weights(other)
        assert ours.keys() == theirs.keys() and ours
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())

    return check
