"""The built-in chat templates by name, and what their models' publishers say about sampling."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion
from nautile.text.templates import coder, v2, v3, v31, v32
from nautile.text.templates.messages import Conversation


@dataclass(frozen=True)
class Format:
    """A way of writing conversations that some published models were trained on."""

    render: Callable[[Conversation], str]
    """Messages to the text after which the model answers."""
    models: str
    """Whose format it is."""
    both_ways: bool = False
    """The template asks for an answer with or without reasoning; others know one way."""
    ends: tuple[str, ...] = ()
    """Tokens that end an answer besides the tokenizer's end-of-text token."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Sampling that the publisher recommends, for folders without generation_config.json."""
    source: str = ""
    """Who says so."""


FORMATS: dict[str, Format] = {
    "v2": Format(
        v2.render,
        "DeepSeek-LLM, MoE-16B, V2, V2-Lite, Coder-V2 (chat and instruct)",
        sampling={"temperature": 0.3},
        source="READMEs of DeepSeek-V2 and DeepSeek-Coder-V2",
    ),
    "coder": Format(
        coder.render,
        "DeepSeek-Coder-Instruct",
        ends=(coder.END_OF_TURN,),
        sampling={"temperature": 0.0},
        source="README of DeepSeek-Coder",
    ),
    "v2.5": Format(v3.render, "V2.5", sampling={"temperature": 0.3}, source="README of DeepSeek-V2"),
    "v3": Format(v3.render, "V3, V3-0324", sampling={"temperature": 0.3}, source="model card of DeepSeek-V3-0324"),
    "r1": Format(
        v3.render_reasoning,
        "R1, R1-Distill-Qwen, R1-Distill-Llama",
        sampling={"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
        source="README of DeepSeek-R1",
    ),
    "r1-0528": Format(
        v3.render,
        "R1-0528, which opens its reasoning itself",
        sampling={"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
        source="README of DeepSeek-R1",
    ),
    "v3.1": Format(
        v31.render,
        "V3.1, V3.1-Terminus, V3.2-Exp",
        both_ways=True,
        sampling={"temperature": 0.6, "top_p": 0.95},
        source="generation_config.json of DeepSeek-V3.1-Terminus",
    ),
    "v3.2": Format(
        v32.render,
        "V3.2, V3.2-Speciale",
        both_ways=True,
        sampling={"temperature": 1.0, "top_p": 0.95},
        source="model card of DeepSeek-V3.2",
    ),
}
"""Name → format. The names are what ``--chat-template`` takes."""


def format_named(name: str) -> Format:
    """The built-in format called `name`.

    Raises:
        UserError: There is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    raise UserError(
        f"no built-in chat template is called {name!r}",
        "a name stands for the format of a published model",
        suggestion(name, FORMATS, "built-in templates"),
    )
