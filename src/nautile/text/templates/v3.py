"""The format of V3, R1 and R1's distillates: roles are tokens.

    {bos}{system}<｜User｜>{question}<｜Assistant｜>{answer}{eos}<｜User｜>{question}<｜Assistant｜>

R1 begins its answer with ``<think>\\n``, which its later template writes for it, and past answers lose everything up to
``</think>``, unless they answer to a tool's result. Calls of tools:

    <｜Assistant｜>{text}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\\n```json\\n{arguments}\\n```
    <｜tool▁call▁end｜>\\n<｜tool▁call▁begin｜>…<｜tool▁call▁end｜><｜tool▁calls▁end｜>{eos}
    <｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{result}<｜tool▁output▁end｜><｜tool▁output▁begin｜>…<｜tool▁outputs▁end｜>

(without the line ends between the three rows). Sources: three tokenizer_config.json: V3's first, the later one that V3
and R1 share, R1-Distill-Qwen-32B's. Two slips of the published programs are not repeated: V3's first never closes a
single call, and all of them forget the opening tokens from the second round of calls on. None has a place for the
tools' descriptions; they belong into the system message.
"""

from collections.abc import Sequence

from nautile.core.errors import UserError
from nautile.text.templates.messages import Conversation, Message, as_json, calls, content, system_prompt
from nautile.text.thinking import drop_reasoning


def render(conversation: Conversation) -> str:
    """V3's text after which the model answers; reasoning in past answers goes, as in the later file."""
    return "".join([*_turns(conversation), *_assistant(conversation)])


def render_reasoning(conversation: Conversation) -> str:
    """R1's: the same, and the answer begins with ``<think>``."""
    opened = _assistant(conversation)
    return "".join([*_turns(conversation), *opened, *(["<think>\n"] if opened else [])])


def _assistant(conversation: Conversation) -> list[str]:
    """What opens the next answer; after a tool's result the assistant's turn is still open."""
    turns = _without_system(conversation.messages)
    return [] if turns and turns[-1]["role"] == "tool" else ["<｜Assistant｜>"]


def _turns(conversation: Conversation) -> list[str]:
    if conversation.tools:
        raise UserError(
            "the V3 chat template has no place for descriptions of tools",
            "the published one has none either",
            "describe them in the system message",
        )
    parts = [conversation.bos, system_prompt(conversation.messages)]
    messages = _without_system(conversation.messages)
    for i, message in enumerate(messages):
        after_tool = i > 0 and messages[i - 1]["role"] == "tool"
        before_tool = i + 1 < len(messages) and messages[i + 1]["role"] == "tool"
        match message["role"]:
            case "user":
                parts.append(f"<｜User｜>{content(message)}")
            case "tool":
                parts.append("" if after_tool else "<｜tool▁outputs▁begin｜>")
                parts.append(f"<｜tool▁output▁begin｜>{content(message)}<｜tool▁output▁end｜>")
                parts.append("" if before_tool else "<｜tool▁outputs▁end｜>")
            case "assistant" if calls(message):
                parts.append(f"<｜Assistant｜>{content(message)}{_calls(message)}{conversation.eos}")
            case "assistant":
                text = content(message)
                parts.append(text if after_tool else "<｜Assistant｜>" + drop_reasoning(text))
                parts.append(conversation.eos)
    return parts


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The turns: a system message has gone to the front, and stands between no others."""
    return [message for message in messages if message["role"] != "system"]


def _calls(message: Message) -> str:
    each = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call['name']}\n```json\n{_arguments(call['arguments'])}\n```"
        "<｜tool▁call▁end｜>"
        for call in calls(message)
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(each) + "<｜tool▁calls▁end｜>"


def _arguments(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else as_json(arguments)
