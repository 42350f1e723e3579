import os
import subprocess
import sys

import pytest

from nautile.cli.main import main
from nautile.cli.pretrain import free_folder, parse
from nautile.core.errors import UserError

TINY = """
name: tiny
model: {preset: v3-nano, vocab_size: 300, hidden_size: 32, num_hidden_layers: 2}
tokenizer: {vocab_size: 300}
data: {source: files, paths: [texts], validation_fraction: 0.3, cache: cache}
schedule: {warmup_steps: 2}
train: {steps: 6, batch_size: 2, sequence_length: 32, checkpoint_every: 2, log_every: 1, precision: fp32}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with some text and a recipe over it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text("\n".join(f"line {j} of file {i}" for j in range(30)))
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def test_flags_stand_over_the_recipe():
    arguments = parse(["v3-micro", "--train.steps", "7", "--optim.lr=1e-4", "--data.paths", "--train.stop_after", "3"])
    recipe = arguments.recipe
    assert (recipe.train.steps, recipe.optim.lr, recipe.train.stop_after) == (7, 1e-4, 3)
    assert recipe.model.hidden_size == 192


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "no recipe is given"),
        (["v3-mirco"], "nautile pretrain v3-micro"),
        (["v3-nano", "--train.stpes", "3"], "--train.steps"),
        (["v3-nano", "--train.micro-batch-size", "3"], "does not divide"),
        (["v3-nano", "--train.steps", "many"], "many"),
        (["--resume", "runs/missing"], "holds no run"),
    ],
)
def test_mistakes_are_told_with_a_cure(argv, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        parse(argv)
    assert told in str(error.value)


def test_out_and_resume_exclude_each_other(folder):
    with pytest.raises(UserError, match="together with"):
        (folder / "run").mkdir()
        (folder / "run" / "config.yaml").write_text(TINY)
        parse(["--resume", "run", "--out", "other"])


def test_train_stop_resume_report(folder, capsys):
    assert main(["pretrain", "tiny.yaml", "--train.stop-after", "2", "--out", "run"]) == 0
    assert main(["pretrain", "tiny.yaml", "--out", "run"]) == 2  # the folder holds a run
    assert main(["pretrain", "tiny.yaml", "--resume", "run", "--seed", "3"]) == 2
    assert "seed: 0 → 3" in capsys.readouterr().err
    assert main(["pretrain", "--resume", "run"]) == 0
    told = capsys.readouterr().err
    assert "resuming run after step 2" in told and "next: nautile chat run" in told
    assert (folder / "run" / "report.html").exists()
    assert main(["pretrain", "--resume", "run"]) == 0
    assert "is finished: 6 steps" in capsys.readouterr().err


def test_another_corpus_is_refused_before_it_is_prepared(folder, capsys):
    assert main(["pretrain", "tiny.yaml", "--train.stop-after", "1", "--out", "run"]) == 0
    prepared = sorted((folder / "cache").iterdir())
    assert main(["pretrain", "--resume", "run", "--data.fim-rate", "0.5"]) == 2
    assert "data.fim_rate: 0.1 → 0.5" in capsys.readouterr().err
    assert sorted((folder / "cache").iterdir()) == prepared


def test_a_run_goes_on_after_its_tokenizer_moved(folder, capsys):
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data.source",
                "files",
                "--data.paths",
                "texts",
                "--tokenizer.vocab-size",
                "300",
                "--out",
                "mine",
            ]
        )
        == 0
    )
    assert main(["pretrain", "tiny.yaml", "--tokenizer.path", "mine", "--train.stop-after", "1", "--out", "run"]) == 0
    (folder / "mine").rename(folder / "moved")
    assert main(["pretrain", "--resume", "run"]) == 2
    assert "mine does not exist" in capsys.readouterr().err
    assert main(["pretrain", "--resume", "run", "--tokenizer.path", "moved"]) == 0
    assert "resuming run after step 1" in capsys.readouterr().err


def test_samples_fit_into_a_short_context(folder):
    short = ["--train.steps", "1", "--model.max-position-embeddings", "32", "--out", "run"]
    assert main(["pretrain", "tiny.yaml", *short]) == 0
    assert (folder / "run" / "samples.jsonl").read_text().count("line") > 0


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_can_go_on(folder):
    command = [sys.executable, "-m", "nautile", "pretrain"]
    process = subprocess.Popen(
        [*command, "tiny.yaml", "--train.steps", "100000", "--train.log-every", "100000", "--out", "run"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    while not (folder / "run" / "checkpoints" / "step-000002").exists():
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(2)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "SIGINT: saving after this step" in told and "next: nautile pretrain --resume run" in told


def test_a_second_run_of_the_same_name_gets_a_folder_of_its_own(tmp_path, capsys):
    wanted = tmp_path / "v3-micro"
    assert free_folder(wanted) == wanted
    for name in ("v3-micro", "v3-micro-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert free_folder(wanted) == tmp_path / "v3-micro-3"
    assert f"--resume {wanted} would continue it" in capsys.readouterr().err
