import pytest
import torch

from nautile.train import budget


@pytest.fixture
def two_cores(monkeypatch):
    """What the machine offers, as a list that holds the number of threads in force."""
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


@pytest.mark.parametrize(
    ("alone", "together", "chosen", "told"),
    [(0.3, 1.9, (1, 0.3), "other work is running"), (0.3, 0.2, (2, 0.2), "with one 0.30 s")],
)
def test_the_faster_number_of_threads_is_chosen(alone, together, chosen, told, two_cores, monkeypatch):
    monkeypatch.setattr(
        budget, "seconds_per_step", lambda r, d, threads, too_slow=0.0: {1: alone, 2: together}[threads]
    )
    threads, seconds, why = budget.fastest_threads(None, None)
    assert (threads, seconds) == chosen and told in why


def test_one_core_needs_no_comparison(two_cores, monkeypatch):
    two_cores.append(1)
    monkeypatch.setattr(budget, "seconds_per_step", lambda r, d, threads: 0.5)
    assert budget.fastest_threads(None, None) == (1, 0.5, "there is one core")


def test_threads_are_as_before_afterwards(two_cores):
    with budget.cpu_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), budget.cpu_threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_a_slow_step_ends_the_measurement(recipe, data):
    before = torch.get_num_threads()
    assert budget.seconds_per_step(recipe, data, 1, too_slow=0.0) > 0
    assert budget.seconds_per_step(recipe, data, 1, steps=1) > 0
    assert torch.get_num_threads() == before
