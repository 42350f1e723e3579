"""Verbs with several actions, such as ``nautile data prepare`` and ``nautile data show``."""

from collections.abc import Callable, Mapping, Sequence

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion

Action = Callable[[Sequence[str]], int]


def run_action(
    verb: str, summary: str, actions: Mapping[str, tuple[Action, str]], examples: Sequence[str], argv: Sequence[str]
) -> int:
    """Run the action that the first word names with the words after it; without one, or with --help, list them.

    Args:
        verb: The command up to here, e.g. ``"nautile data"``.
        summary: What the verb does.
        actions: Name → function and one line about it.
        examples: Commands shown with the list.
        argv: The words after the verb.

    Raises:
        UserError: there is no such action.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, actions))
        listed = "\n".join(f"  {name:<{width}}  {about}" for name, (_, about) in actions.items())
        shown = "\n".join(f"  {example}" for example in examples)
        print(f"usage: {verb} ACTION [arguments]\n\n{summary}\n\nactions:\n{listed}\n\nexamples:\n{shown}")
        print(f"\n{verb} ACTION --help shows an action's arguments.")
        return 0
    if argv[0] not in actions:
        cure = suggestion(argv[0], actions, "actions")
        raise UserError(f"unknown action {argv[0]!r}", f"{verb} needs to know what to do", cure)
    return actions[argv[0]][0](argv[1:])
