"""The format of V3.1, V3.1-Terminus and V3.2-Exp: V3's, and the answer begins with a token that says how.

    {bos}{system}<｜User｜>{question}<｜Assistant｜></think>{answer}{eos}<｜User｜>{question}<｜Assistant｜><think>

``<think>`` asks for reasoning first, ``</think>`` for none; past answers always stand behind ``</think>``, whatever
way they were given. An answer to a tool's result goes on with the turn that called it: no opening, nothing cut, and
without a question nothing opens. Calls of tools are shorter than V3's, and the tools are described behind the system
message:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>{eos}
    <｜tool▁output▁begin｜>{result}<｜tool▁output▁end｜>

Sources: V3.1's model card and chat_template.jinja; the tools' description as the card and vLLM's template have it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nautile.text.templates.messages import Conversation, Message, as_json, calls, content, system_prompt

RULES = """
IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""


def render(conversation: Conversation) -> str:
    """The text after which the model answers, with reasoning if `conversation.thinking`."""
    messages = conversation.messages
    parts = [conversation.bos, system_prompt(messages)]
    if conversation.tools:
        parts.append("\n\n" + describe(conversation.tools))
    asked = after_tool = False  # a system message between changes neither
    for message in messages:
        opening = "<｜Assistant｜></think>" if asked else ""
        text = content(message)
        match message["role"]:
            case "user":
                parts.append(f"<｜User｜>{text}")
            case "tool":
                parts.append(f"<｜tool▁output▁begin｜>{text}<｜tool▁output▁end｜>")
            case "assistant" if calls(message):
                parts.append(opening + text + _calls(message) + conversation.eos)
            case "assistant":
                parts.append(opening + (text if after_tool else _answer(text)) + conversation.eos)
        if message["role"] != "system":
            asked, after_tool = message["role"] == "user", message["role"] == "tool"
    if asked:
        parts.append("<｜Assistant｜>" + ("<think>" if conversation.thinking else "</think>"))
    return "".join(parts)


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools and how to call them, as the system prompt tells it."""
    each = [
        f"\n### {tool['function']['name']}\nDescription: {tool['function'].get('description', '')}\n\n"
        f"Parameters: {as_json(tool['function'].get('parameters', {}))}\n"
        for tool in tools
    ]
    return "## Tools\nYou have access to the following tools:\n" + "".join(each) + RULES


def _answer(text: str) -> str:
    """What follows the first ``</think>``: this format's program cuts there, R1's behind the last one."""
    return text.partition("</think>")[2] if "</think>" in text else text


def _calls(message: Message) -> str:
    each = [
        f"<｜tool▁call▁begin｜>{call['name']}<｜tool▁sep｜>{_arguments(call['arguments'])}<｜tool▁call▁end｜>"
        for call in calls(message)
    ]
    return "<｜tool▁calls▁begin｜>" + "".join(each) + "<｜tool▁calls▁end｜>"


def _arguments(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else as_json(arguments)
