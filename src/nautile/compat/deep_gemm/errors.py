"""How wrong arguments are told: DeepGEMM raises `RuntimeError`, we `ValueError`; who catches either catches these."""

from typing import NoReturn


class DeepGemmError(ValueError, RuntimeError):
    """Arguments that DeepGEMM's kernels do not take."""


class NotOnHopperError(NotImplementedError):
    """What DeepGEMM offers on SM100 only. A `RuntimeError`, as `NotImplementedError` is."""


def need(condition: bool, function: str, otherwise: str) -> None:
    """Raise `DeepGemmError` unless `condition` holds."""
    if not condition:
        raise DeepGemmError(f"{function}: {otherwise}")


def sm100_only(function: str, what: str) -> NoReturn:
    """Raise `NotOnHopperError`, naming the part of DeepGEMM that needs Blackwell."""
    raise NotOnHopperError(f"{function}: {what} needs SM100 tensor cores; nautile has DeepGEMM's SM90 set")
