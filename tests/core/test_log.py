import pytest

from nautile.core import log as logging
from nautile.core.log import log, progress, warn


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logging, "time", clock)
    return clock


def test_lines_go_to_stderr_as_they_are(capsys):
    log("[bold]loss[/bold] 3.2")
    warn("2 files skipped")
    captured = capsys.readouterr()
    assert captured.err == "[bold]loss[/bold] 3.2\nwarning: 2 files skipped\n"
    assert captured.out == ""


def test_progress_without_a_terminal_prints_now_and_then_and_at_the_end(capsys, clock):
    with progress("pre-training", total=4) as bar:
        bar.advance(text="loss 9")
        clock.now = logging.PLAIN_EVERY
        bar.advance(text="loss 8")
        bar.advance()
        bar.advance(text="loss 7")
    assert capsys.readouterr().err == "pre-training 2/4  loss 8\npre-training 4/4  loss 7\n"


def test_progress_goes_on_from_where_a_run_resumed(capsys, clock):
    with progress("pre-training", total=40, start=20) as bar:
        bar.advance(20)
    assert capsys.readouterr().err == "pre-training 40/40\n"


def test_an_interrupted_piece_of_work_says_how_far_it_came(capsys, clock):
    with pytest.raises(KeyboardInterrupt), progress("x", total=4) as bar:
        bar.advance(3)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "x 3/4\n"


def test_on_a_terminal_a_bar_and_lines_share_the_screen(capsys, monkeypatch):
    monkeypatch.setattr(logging, "_terminal", lambda: True)
    logging._console.cache_clear()
    with progress("pre-training", total=2) as bar:
        bar.advance(text="loss 9")
        log("saved [a]")
        bar.advance(text="loss 8")
    err = capsys.readouterr().err
    logging._console.cache_clear()  # it holds the captured stderr
    assert "saved [a]" in err
    assert "2/2" in err
    assert "loss 8" in err
