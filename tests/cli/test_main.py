import os
import re
import subprocess
import sys
import time
import types

import pytest

from nautile.cli import main as command
from nautile.cli.main import VERBS, help_text, main
from nautile.core.errors import NautileError, UserError


def nautile(*words: str, python: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, *python, "-m", "nautile", *words]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=os.environ | environment)


@pytest.fixture
def verb(monkeypatch):
    """Make ``nautile try`` call a function of the test."""

    def install(function) -> None:
        module = types.ModuleType("nautile_try")
        module.main = function
        monkeypatch.setitem(sys.modules, "nautile_try", module)
        monkeypatch.setitem(VERBS, "try", ("nautile_try", "a verb of this test"))

    monkeypatch.delenv("NAUTILE_DEBUG", raising=False)
    return install


def raiser(error: BaseException):
    def run(argv):
        raise error

    return run


def imported(words: tuple[str, ...]) -> set[str]:
    """Top-level packages that a command imports."""
    done = nautile(*words, python=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
    assert any(module.startswith("nautile.cli") for module in modules)
    return {module.partition(".")[0] for module in modules}


def test_help_imports_next_to_nothing():
    assert not imported(("--help",)) & {"torch", "numpy", "tyro", "rich", "yaml", "matplotlib", "tokenizers"}


@pytest.mark.parametrize("name", VERBS)
def test_a_verbs_help_imports_no_torch_and_shows_two_examples(name):
    assert not imported((name, "--help")) & {"torch", "transformers", "matplotlib"}
    shown = nautile(name, "--help").stdout
    assert len(re.findall(rf"^ +nautile {name}\b.*$", shown, re.MULTILINE)) >= 2


def test_help_answers_in_under_a_second():
    def seconds() -> float:
        start = time.perf_counter()
        assert nautile("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1  # the best of three: other processes share the cores


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb_and_two_examples(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.strip() == help_text()
    assert all(re.search(rf"^  {name} +{re.escape(summary)}$", out, re.M) for name, (_, summary) in VERBS.items())
    assert len(re.findall(r"^  nautile ", out, re.M)) == 2


def test_a_verbs_help_is_a_success(capsys):
    assert main(["guide", "--help"]) == 0
    assert "usage: nautile guide" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"nautile \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("word", "first", "cure"),
    [
        ("pretrian", "error: unknown verb 'pretrian'", "did you mean 'pretrain'?"),
        ("--hepl", "error: unknown option '--hepl'", "did you mean '--help'?"),
        ("zzz", "error: unknown verb 'zzz'", f"the verbs are: {', '.join(VERBS)}"),
    ],
)
def test_an_unknown_verb_names_the_nearest(word, first, cure, capsys):
    assert main([word]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[2]) == (first, f"  try: {cure}")


def test_a_verb_gets_its_words_and_gives_the_exit_code(verb):
    got = []
    verb(lambda argv: got.append(argv))
    assert main(["try", "a", "--b"]) == 0
    assert got == [["a", "--b"]]
    verb(lambda argv: 1)
    assert main(["try"]) == 1


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (NautileError, 1)])
def test_errors_for_people_are_three_lines(verb, capsys, kind, code):
    verb(raiser(kind("batch 7 is odd", "pairs are needed", "use --batch 8")))
    assert main(["try"]) == code
    captured = capsys.readouterr()
    assert captured.err == "error: batch 7 is odd\n  why: pairs are needed\n  try: use --batch 8\n"
    assert captured.out == ""


def test_what_nobody_foresaw_is_three_lines_too(verb, capsys):
    verb(raiser(KeyError("gate")))
    assert main(["try"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: KeyError: 'gate'"
    assert "NAUTILE_DEBUG=1" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize("error", [UserError("a", "b", "c"), KeyError("gate")])
def test_debug_shows_the_traceback(verb, monkeypatch, error):
    verb(raiser(error))
    monkeypatch.setenv("NAUTILE_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["try"])


def test_ctrl_c_is_quiet(verb, capsys):
    verb(raiser(KeyboardInterrupt()))
    assert main(["try"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_reader_that_leaves_early_is_no_error():
    script = (
        "from nautile.cli import main as m\nm.help_text = lambda: 'x' * 10_000_000\nimport sys\nsys.exit(m.main([]))"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(timeout=60) == 0


def test_the_process_exits_with_the_code():
    done = nautile("pretrian")
    assert done.returncode == 2
    assert done.stderr == (
        "error: unknown verb 'pretrian'\n  why: nautile has no such command\n  try: did you mean 'pretrain'?\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_value_is_three_lines_in_every_encoding(encoding):
    done = nautile("doctor", "--seconds", "many", PYTHONIOENCODING=encoding)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert lines[0].startswith("error: Error parsing --seconds: ")
    assert "many" in lines[0]
    assert len(lines) == 3


def test_every_verb_is_there():
    import importlib

    for module, _ in VERBS.values():
        assert callable(importlib.import_module(module).main)
    assert command.EXAMPLES[0] == "nautile demo"


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly_unless_the_user_decided(monkeypatch, given, count):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # Set first, so that what main() sets is taken back when the test ends.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == count
