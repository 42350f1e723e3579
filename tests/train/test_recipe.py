import subprocess
import sys
from dataclasses import replace

import pytest

from nautile.core.config import dump_yaml
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_MICRO
from nautile.train.recipe import TrainConfig, conflicts, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_check_and_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    dump_yaml(recipe, tmp_path / "config.yaml")
    assert load_recipe(str(tmp_path / "config.yaml")) == recipe


def test_a_preset_is_the_base_that_other_keys_replace(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {preset: v3-micro, num_hidden_layers: 2}\ntokenizer: {vocab_size: 4096}\n")
    assert load_recipe(str(tmp_path / "r.yaml")).model == replace(V3_MICRO, num_hidden_layers=2)


def test_overrides_are_dotted_and_strict():
    assert load_recipe("v3-nano", {"train.steps": 7, "optim.lr": 1e-3}).train.steps == 7
    with pytest.raises(UserError, match="'stepz'"):
        load_recipe("v3-nano", {"train.stepz": 7})


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError) as error:
        load_recipe("v3-mikro")
    assert "v3-mikro" in error.value.what and error.value.cure == "nautile pretrain v3-micro"
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe("missing.yaml")


def test_unknown_key_says_file_and_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {preset: v3-nano}\ntokenizer: {vocab_size: 1024}\noptim:\n  lerning_rate: 1e-3\n")
    with pytest.raises(UserError, match=r"r\.yaml:4: unknown key 'lerning_rate'"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"train.micro_batch_size": 3}, "does not divide"),
        ({"train.sequence_length": 100_000}, "max_position_embeddings"),
        ({"train.micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"train.batch_size": 0}, "batch_size is 0"),
        ({"train.steps": 0}, "train.steps is 0"),
        ({"train.stop_after": 0}, "train.stop_after is 0"),
        ({"tokenizer.vocab_size": 5000}, "exceeds model.vocab_size"),
        ({"tokenizer.vocab_size": 1024}, "far below model.vocab_size"),
        ({"schedule.constant_until": 0.97}, "out of order"),
        ({"mtp.switch_at": 1.5}, "outside 0..1"),
        ({"model.aux_loss_alpha": -1e-4}, "aux_loss_alpha"),
        ({"optim.lr": 0.0}, "must be positive"),
        ({"optim.beta1": 1.5}, "optim.beta1 is 1.5"),
        ({"optim.beta1": -0.1}, "optim.beta1 is -0.1"),
        ({"optim.beta2": 1.0}, "optim.beta2 is 1.0"),
        ({"optim.eps": 0.0}, "optim.eps is 0.0"),
        ({"schedule.floor": 1.1}, "schedule.floor is 1.1"),
        ({"schedule.final": -1.0}, "schedule.final is -1.0"),
        ({"schedule.final": float("nan")}, "schedule.final is nan"),
        ({"schedule.decay_factor": 2.0}, "schedule.decay_factor is 2.0"),
        ({"model.num_nextn_predict_layers": -1}, "num_nextn_predict_layers -1 is not possible"),
        ({"model.num_experts_per_tok": 64}, "num_experts_per_tok"),
    ],
)
def test_contradictions_are_refused(override, told):
    with pytest.raises(UserError, match=told):
        load_recipe("v3-micro", override)


def test_conflicts_show_what_forbids_resuming_and_let_bookkeeping_pass():
    recipe = load_recipe("v3-nano")
    same = replace(recipe, train=replace(recipe.train, stop_after=5, log_every=1, keep_checkpoints=9), name="other")
    assert conflicts(recipe, same) == []
    longer = replace(recipe, train=replace(recipe.train, steps=60))
    assert conflicts(recipe, longer) == [f"train.steps: {recipe.train.steps} → 60"]


def test_every_field_of_a_recipe_is_documented():
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    from nautile.core.config import field_docs
    from nautile.train.recipe import PretrainRecipe

    def undocumented(cls):
        docs = field_docs(cls)
        hints = get_type_hints(cls)
        missing = [f"{cls.__name__}.{f.name}" for f in fields(cls) if not docs.get(f.name)]
        return missing + [m for f in fields(cls) if is_dataclass(hints[f.name]) for m in undocumented(hints[f.name])]

    assert undocumented(PretrainRecipe) == []


def test_recipes_and_help_need_no_torch():
    code = (
        "import sys; from nautile.cli.pretrain import parse\n"
        "try: parse(['v3-micro', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--train.stop-after" in done.stdout


def test_defaults_are_v3s():
    assert TrainConfig().precision == "auto"
    recipe = load_recipe("v3-nano")
    assert (recipe.mtp.weight, recipe.mtp.final_weight, recipe.model.aux_loss_alpha) == (0.3, 0.1, 1e-4)
