"""What a conversation's answer is made of: its reasoning and its text, parted whole or as they stream."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from nautile.core.log import warn
from nautile.infer.completion import Output
from nautile.infer.prompt import ChatPrompt
from nautile.text.thinking import CLOSE, Piece, ThinkSplitter, split_thinking


def answer_of(output: Output, prompt: ChatPrompt) -> Output:
    """The output with its reasoning apart from its text; says so if it was cut before any answer began."""
    reasoning, text = split_thinking(output.text, prompt.thinking)
    if output.finish_reason == "length" and reasoning and CLOSE not in output.text:
        warn(f"an answer was cut after {len(output.token_ids)} tokens, while still reasoning; raise max_tokens")
    return replace(output, text=text, reasoning=reasoning)


def pieces_of(stream: Iterable[str], prompt: ChatPrompt) -> Iterator[Piece]:
    """The same of an answer that streams: each piece belongs to one part."""
    splitter = ThinkSplitter(prompt.thinking)
    for text in stream:
        yield from splitter.push(text)
    yield from splitter.flush()


def several(messages: object) -> bool:
    """Whether `messages` are a list of conversations instead of one."""
    return isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
