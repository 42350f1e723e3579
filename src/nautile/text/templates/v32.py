"""The format of V3.2 and V3.2-Speciale, which come with a Python encoder instead of a Jinja program.

    {bos}{system}<｜User｜>{question}<｜Assistant｜></think>{answer}{eos}<｜User｜>{question}<｜Assistant｜><think>

As V3.1's, but a question brings the beginning of its answer with it, reasoning is kept since the last question (so that
a model that calls tools sees why it did), and tools are described and called in DSML, an XML whose tags begin with
``｜DSML｜``. Source: encoding/encoding_dsv32.py in the model's repository.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nautile.core.errors import UserError
from nautile.text.templates.messages import Conversation, Message, as_json, calls, content

TOOLS = """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:
<｜DSML｜function_calls>
...
</｜DSML｜function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
%s
</functions>
"""  # noqa: E501 - the model was trained on these very lines
"""What the system prompt says about tools; the place holder is for their descriptions, one JSON object a line."""


def render(conversation: Conversation) -> str:
    """The text after which the model answers, with reasoning if `conversation.thinking`."""
    messages = list(conversation.messages)
    if conversation.tools and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": ""})
    last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    parts = [conversation.bos]
    for i, message in enumerate(messages):
        thinking = conversation.thinking and i >= last_question
        begin = "<think>" if thinking else "</think>"
        match message["role"]:
            case "system":
                parts.append(content(message))
                parts.append("\n\n" + describe(conversation.tools) if conversation.tools and i == 0 else "")
            case "user":
                parts.append(f"<｜User｜>{content(message)}<｜Assistant｜>{begin}")
            case "tool":
                parts.append(_result(messages, i, begin))
            case _:
                reasoning = _reasoning(message) + "</think>" if thinking else ""
                parts.append(reasoning + content(message) + _calls(message) + conversation.eos)
    return "".join(parts)


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools and how to call them, as the system prompt tells it."""
    return TOOLS % "\n".join(as_json(tool["function"]) for tool in tools)


def _reasoning(message: Message) -> str:
    reasoning = message.get("reasoning_content")
    if reasoning or calls(message):
        return reasoning or ""
    raise UserError(
        "an answer after the last question has no reasoning_content",
        "in thinking mode this format shows the model how it reasoned since then",
        "add reasoning_content to that message, end with a question, or switch thinking off",
    )


def _calls(message: Message) -> str:
    each = [
        f'<｜DSML｜invoke name="{call["name"]}">\n{_arguments(call["arguments"])}\n</｜DSML｜invoke>'
        for call in calls(message)
    ]
    block = "\n".join(each)
    return f"\n\n<｜DSML｜function_calls>\n{block}\n</｜DSML｜function_calls>" if each else ""


def _arguments(arguments: str | Mapping[str, Any]) -> str:
    """One line per argument: strings as they are, everything else as JSON."""
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    return "\n".join(
        f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else as_json(value)}</｜DSML｜parameter>"
        for key, value in values.items()
    )


def _result(messages: Sequence[Message], at: int, begin: str) -> str:
    """A tool's result: the first of a round opens the block, the last closes it and begins the next answer.

    Raises:
        UserError: Nothing called a tool before.
    """
    first = at
    while first > 0 and messages[first - 1]["role"] == "tool":
        first -= 1
    asked = len(calls(messages[first - 1])) if first > 0 else 0
    if at - first >= asked:
        raise UserError(
            "a tool's result follows no call of a tool",
            f"the message before it holds {asked} calls, and each result belongs to one of them",
            "give the assistant's message with its tool_calls before the results, in the same order",
        )
    opening = "\n\n<function_results>" if at == first else ""
    closing = f"\n</function_results>\n\n{begin}" if at - first + 1 == asked else ""
    return f"{opening}\n<result>{content(messages[at])}</result>{closing}"
