"""Which published format a model folder's conversations have, as far as its files tell.

V3, R1 and V3.1 share one architecture and one tokenizer, and so do a base model and its chat model: where no template
lies in the folder, its name is the best witness, then the role tokens at the ids they have in the published tokenizer
of the family. Models trained here have the same role tokens at other ids, so they stay base models.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TokenId = Callable[[str], int | None]
"""Id of a token by its text, or None."""


@dataclass(frozen=True)
class Choice:
    """The name of a built-in format, or None for a base model; and what it was read from."""

    name: str | None
    reason: str


_CHAT = r"chat|instruct"
NAMES: tuple[tuple[str, str | None], ...] = (
    (r"-base\b", None),
    (r"r1-zero", None),  # it was trained on another prompt, in words
    (r"r1-0528", "r1-0528"),
    (r"deepseek-r1", "r1"),
    (r"v3\.2-exp", "v3.1"),
    (r"v3\.2", "v3.2"),
    (r"v3\.1", "v3.1"),
    (r"deepseek-v3\b", "v3"),
    (r"v2\.5|v2-chat-0628", "v2.5"),
    (rf"coder-v2.*({_CHAT})", "v2"),
    (rf"coder.*({_CHAT})", "coder"),
    (rf"(v2|moe|llm|math).*({_CHAT})|math.*-rl\b", "v2"),
)
"""Pattern in a folder's name, lower case → format; the first that matches counts. None: no chat."""

_NUMBERS = re.compile(r"([-_.](bf16|fp16|fp32|fp8|fp4|int8|int4|awq|gptq|w4a16|w8a8))+$")
"""What converters append to a name: the type of the numbers, which changes no format."""

ROLE_TOKENS = ("<｜User｜>", "<｜Assistant｜>")
ROLE_IDS = {
    "deepseek_v3": (128803, 128804),
    "deepseek_v32": (128803, 128804),
    "qwen2": (151644, 151645),
    "llama": (128011, 128012),
}
"""model_type → ids of the role tokens in the published tokenizer: V3's, R1-Distill-Qwen's, R1-Distill-Llama's."""


def choose(folder: Path, published: Mapping[str, Any], token_id: TokenId, eos: str) -> Choice:
    """The format of the model in `folder`.

    Args:
        folder: Where it lies; only its name is used.
        published: Its config.json.
        token_id: Looks up tokens of its tokenizer.
        eos: Text of its end-of-text token.
    """
    title = title_of(folder)
    plain = _NUMBERS.sub("", title.lower())
    for pattern, name in NAMES if "deepseek" in plain else ():
        if re.search(pattern, plain):
            return Choice(name, f"the folder is called {title}")
    return _by_tokens(published, token_id, eos)


def title_of(folder: Path) -> str:
    """What a model's folder is called: its own name, a run's for ``RUN/model``, a repository's in a download cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.parent.name if folder.name == "model" else folder.name


def _by_tokens(published: Mapping[str, Any], token_id: TokenId, eos: str) -> Choice:
    family = str(published.get("model_type"))
    published_roles = ROLE_IDS.get(family) == tuple(token_id(token) for token in ROLE_TOKENS)
    if family in ("llama", "qwen2") and published_roles:
        return Choice("r1", f"a {family} model with the role tokens of DeepSeek-R1's distillates")
    if family == "llama" and eos == "<|EOT|>":
        return Choice("coder", "answers end with <|EOT|>")
    if family == "deepseek_v32" and published_roles:
        return Choice("v3.2", "a deepseek_v32 model with V3's role tokens")
    if family == "deepseek_v3" and published_roles:
        if dict(published.get("quantization_config") or {}).get("scale_fmt") == "ue8m0":
            return Choice("v3.1", "a deepseek_v3 model whose scales are powers of two, as V3.1's are")
        return Choice("v3", "a deepseek_v3 model with V3's role tokens; R1's and V3.1's have to be named")
    return Choice(None, "nothing in the folder tells of a chat format")
