"""What a person sees when something is wrong: what happened, why, and what to type.

Asserts are for us; these are for people. The command line prints the three lines and exits with `exit_code`;
a traceback appears only with ``NAUTILE_DEBUG=1``.
"""


class NautileError(Exception):
    """Something failed although the request was sound (a full disk, a lost file). Exit code 1.

    Args:
        what: What happened, naming the offending value.
        why: Why that is a problem.
        cure: What to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, cure: str) -> None:
        super().__init__(what, why, cure)
        self.what, self.why, self.cure = what, why, cure

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  try: {self.cure}"


class DiskFullError(NautileError):
    """There was no room for a file. Exit code 1."""


class UserError(NautileError):
    """The request itself cannot be met (an unknown key, a missing file). Exit code 2."""

    exit_code = 2
