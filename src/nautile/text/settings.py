"""tokenizer_config.json: which tokens play which role, whether a text gets a begin token, and the chat template.

The file stands beside a tokenizer.json and completes it. What it leaves out is decided as the models that were
published without it need it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nautile.core.json_file import read_json_object

ROLES = {
    "bos_token": ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>"),
    "eos_token": ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    "pad_token": ("<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<pad>"),
}
"""Role → usual names of its token, for files that do not mention the role."""


@dataclass(frozen=True)
class Settings:
    """Contents of a tokenizer_config.json, and of a chat_template.jinja beside it."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """The file as it is; what a saved copy says again."""

    @classmethod
    def load(cls, folder: Path) -> "Settings":
        """Of a folder; without the files everything is left open.

        Raises:
            UserError: tokenizer_config.json is not a JSON object.
        """
        file, program = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        purpose, cure = "it says which tokens begin and end a text", "copy it again, or remove it to go by usual names"
        fields = read_json_object(file, purpose, cure) if file.is_file() else {}
        if program.is_file():  # where both exist, the program is the newer form
            fields = {**fields, "chat_template": program.read_text("utf-8")}
        return cls(fields)

    def role(self, role: str, ids: Mapping[str, int]) -> int | None:
        """Id of the token that plays `role`; None where the file says null, or neither names it nor has a usual one."""
        names = ROLES[role]
        if role in self.fields:
            named = self.fields[role]
            names = () if named is None else (named["content"] if isinstance(named, dict) else named,)
        return next((ids[name] for name in names if name in ids), None)

    def adds_bos(self, post_processor: Mapping[str, Any] | None, bos: str) -> bool:
        """Whether a text is meant to begin with the begin token.

        ``add_bos_token`` decides; without it what tokenizer.json's post-processor does; without one, Llama's tokenizer
        classes add it and others do not.
        """
        said = self.fields.get("add_bos_token")
        if said is not None:
            return bool(said)
        opening = _opening_token(post_processor)
        if opening is not None:
            return opening == bos
        return str(self.fields.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama"))

    @property
    def chat_template(self) -> str | None:
        """The Jinja program that turns messages into text; None in a base model's folder.

        Of several named ones it is the one called "default".
        """
        source = self.fields.get("chat_template")
        if isinstance(source, list):
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        return source if source and isinstance(source, str) else None


def _opening_token(post_processor: Mapping[str, Any] | None) -> str | None:
    """The special token that a tokenizer.json's post-processor puts first; "" for none, None if it has no template."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        found = [_opening_token(part) for part in post_processor["processors"]]
        return next((token for token in found if token is not None), None)
    if post_processor["type"] != "TemplateProcessing":
        return None
    first = post_processor["single"][0] if post_processor["single"] else {}
    return first["SpecialToken"]["id"] if "SpecialToken" in first else ""
