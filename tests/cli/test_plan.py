import json
import subprocess
import sys

import pytest

from nautile.cli import plan, plan_source
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_671B, V3_NANO
from nautile.models.presets import PRESETS


def planned(capsys, *words):
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_v3_from_its_preset_and_from_its_config_file_are_the_same(capsys, tmp_path):
    preset = planned(capsys, "v3-671b")
    assert preset["parameters"]["main_model"]["total"] == 671_026_419_200
    assert preset["parameters"]["published_fp8_checkpoint"]["numbers"] == 684_531_386_000
    (tmp_path / "config.json").write_text(json.dumps(V3_671B.to_hf()))
    for word in (tmp_path, tmp_path / "config.json"):
        assert planned(capsys, str(word))["parameters"] == preset["parameters"]


def test_the_published_saving_of_v2_is_shown_with_and_without_quantised_elements(capsys):
    rows = {row["name"]: row for row in planned(capsys, "v2-236b")["kv_cache_per_token"]}
    assert round(rows["MLA"]["saved_against_deepseek_67b"], 3) == 0.822
    assert round(rows["MLA, 6 bits (V2 paper §3.2.3)"]["saved_against_deepseek_67b"], 3) == 0.933
    plan.main(["v2-236b"])
    table = capsys.readouterr().out
    assert "82.2 % less" in table and "93.3 % less" in table and "10.1 ×" in table


def test_small_models_are_compared_with_their_own_heads_only(capsys):
    rows = planned(capsys, "v3-micro")["kv_cache_per_token"]
    assert [row["name"] for row in rows] == ["MLA", "MLA, 6 bits (V2 paper §3.2.3)", "as MHA"]
    assert "saved_against_deepseek_67b" not in rows[0]
    assert rows[0]["saved_against_mha"] == 1 - (64 + 16) / (2 * 4 * 32)


def test_a_dense_model_has_groups_already(capsys):
    rows = planned(capsys, "deepseek-llm-67b")["kv_cache_per_token"]
    assert [(row["name"], row["elements"]) for row in rows] == [("GQA, 8 groups", 194_560), ("as MHA", 1_556_480)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_planned_by_name(capsys, name):
    assert planned(capsys, name)["parameters"]["main_model"]["total"] > 0
    plan.main([name])
    assert "main model" in capsys.readouterr().out


def test_grouped_queries_shrink_the_cache_of_the_distills(capsys):
    rows = planned(capsys, "r1-distill-qwen-32b")["kv_cache_per_token"]
    assert [(row["name"], row["elements"]) for row in rows] == [
        ("GQA, 8 groups", 2 * 8 * 128 * 64),
        ("as MHA", 2 * 40 * 128 * 64),
        ("DeepSeek 67B", 194_560),
    ]


def test_index_keys_of_sparse_attention_have_their_own_rows(capsys):
    rows = {row["name"]: row for row in planned(capsys, "v32-685b")["kv_cache_per_token"]}
    assert rows["MLA and index keys"]["bytes"] == 2 * (576 + 128) * 61
    assert rows["index keys alone, FP8 as in V3.2-Exp"]["bytes"] == 132 * 61


def test_a_name_on_the_hub_is_planned_from_its_config(capsys, tmp_path, monkeypatch):
    asked = []

    def download(remote, weights):
        asked.append((str(remote), weights))
        return tmp_path

    (tmp_path / "config.json").write_text(json.dumps(V3_671B.to_hf()))
    monkeypatch.setattr(plan_source, "download", download)
    report = planned(capsys, "deepseek-ai/DeepSeek-V3")
    assert report["from"] == "deepseek-ai/DeepSeek-V3" and asked == [("deepseek-ai/DeepSeek-V3", False)]


def test_a_recipe_brings_its_batch(capsys):
    report = planned(capsys, "v3-micro")
    assert report["from"] == "recipe v3-micro" and report["batch_size"] > 1
    assert planned(capsys, "v3-micro", "--sequence-length", "64", "--batch-size", "2")["sequence_length"] == 64


def test_a_run_folder_is_planned_from_its_model(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(V3_NANO.to_hf()))
    assert planned(capsys, str(tmp_path))["context"] == V3_NANO.max_position_embeddings


def test_ranks_are_labelled_as_a_plan(capsys):
    plan.main(["v3-micro", "--ranks", "4"])
    out = capsys.readouterr().out
    assert "plan: ZeRO-1, 4 ranks" in out and "one rank today" in out
    memory = planned(capsys, "v3-micro", "--ranks", "4")["training_memory"]
    assert memory["planned_zero1"]["moments"] * 4 == pytest.approx(memory["one_rank"]["moments"], abs=4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["v3-micr"], "did you mean 'v3-micro'"),
        (["v2-lit"], "did you mean 'v2-lite'"),
        (["r1-distill-qwen-7"], "did you mean 'r1-distill-qwen-7b'"),
        (["v3-micro", "--batch-size", "0"], "--batch-size 0"),
        (["v3-micro", "--ranks", "0"], "--ranks 0"),
    ],
)
def test_mistakes_are_named(words, said):
    with pytest.raises(UserError, match=said):
        plan.main(words)


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "bert"}'])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        plan.main([str(tmp_path)])


def test_planning_and_help_need_no_torch():
    verbs = "from nautile.cli import plan, generate, chat; plan.main(['v3-671b', '--json'])"
    code = f"import sys; {verbs}; assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all(name in shown for name in PRESETS)
