"""Byte-level byte-pair tokenizer: DeepSeek's special tokens, the standard tokenizer.json, nothing lost on the way.

``decode(encode(text)) == text`` for every string, because the vocabulary holds all 256 bytes and nothing is
normalised. `encode` reads text as text: a document that contains the characters ``<｜end▁of▁sentence｜>`` cannot end
itself. Chat templates, whose special tokens are meant, pass ``parse_special=True``.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, processors, trainers

from nautile.core.atomic import atomic_write_text
from nautile.core.errors import UserError
from nautile.text.config import TokenizerConfig
from nautile.text.definition import read_definition, without_markup
from nautile.text.pretokenize import byte_alphabet, pre_tokenizer
from nautile.text.settings import Settings

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
"""V3's special tokens; a tokenizer trained here gives them the ids 0, 1, 2, ... in this order."""
VISIBLE = ("<think>", "</think>")
"""Special tokens that decoding shows, as the published R1 tokenizer does: they are part of the answer."""
PLACEHOLDER = "<｜place▁holder▁no▁{}｜>"
"""Name of an unused id, as in the published V3 vocabulary."""


class Tokenizer:
    """Text to token ids and back.

    Args:
        definition: Contents of a tokenizer.json with a byte-level BPE model.
        settings: Contents of the tokenizer_config.json beside it: which tokens begin, end and fill up. A role that the
            file leaves out is looked up by its usual names; beginning and padding fall back on the end-of-text token.
        where: What error messages call this tokenizer.

    Raises:
        UserError: it is not a byte-level BPE tokenizer, or has no end-of-text token.
    """

    def __init__(self, definition: str, settings: Settings | None = None, where: str = "tokenizer") -> None:
        fields = read_definition(definition, where)
        self._definition = definition
        self.settings = settings = settings or Settings()
        """What tokenizer_config.json says."""
        self._added: dict[int, dict[str, Any]] = {token["id"]: token for token in fields["added_tokens"]}
        self._ids: dict[str, int] = {**fields["model"]["vocab"], **{t["content"]: i for i, t in self._added.items()}}
        self._plain = without_markup(fields)
        eos = settings.role("eos_token", self._ids)
        if eos is None:
            raise UserError(
                f"{where} has no end-of-text token",
                "documents and answers end with one",
                'name it in tokenizer_config.json beside the tokenizer: {"eos_token": "..."}',
            )
        self.eos_id = eos
        """Id that ends a document or an answer."""
        bos, pad = settings.role("bos_token", self._ids), settings.role("pad_token", self._ids)
        self.bos_id = eos if bos is None else bos
        """Id that begins a document."""
        self.adds_bos = bos is not None and settings.adds_bos(fields.get("post_processor"), self.token(bos))
        """Whether a text prompt begins with it. Chat templates write it themselves."""
        self.pad_id = eos if pad is None else pad
        """Id that fills up short sequences; it is never scored."""
        self.fim_hole_id = self._ids.get(FIM_HOLE)
        """Id that marks the missing middle; None in a tokenizer without fill-in-the-middle."""
        self.fim_begin_id = self._ids.get(FIM_BEGIN)
        """Id before the prefix; None likewise."""
        self.fim_end_id = self._ids.get(FIM_END)
        """Id after the suffix, where the middle begins; None likewise."""

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the folder of a model or tokenizer that holds one.

        Raises:
            UserError: there is none, or it is not a byte-level BPE tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"{file} does not exist",
                "a tokenizer is a file called tokenizer.json, often in the folder of its model",
                "correct the path, or train one: nautile tokenizer train --out my-tokenizer",
            )
        try:
            definition = file.read_text("utf-8")
        except UnicodeDecodeError:
            definition = ""  # reported with every other file that is no tokenizer.json
        return cls(definition, Settings.load(file.parent), where=str(file))

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads, into `folder`.

        What a loaded tokenizer_config.json said, its chat template included, is said again.
        """
        folder = Path(folder)
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: self.token(token_id) for role, token_id in roles.items()},
            "clean_up_tokenization_spaces": False,
            **self.settings.fields,
        }
        atomic_write_text(folder / "tokenizer.json", self._definition)
        text = json.dumps(config, ensure_ascii=False, indent=2)
        atomic_write_text(folder / "tokenizer_config.json", text + "\n")

    def digest(self) -> str:
        """Hash of what this tokenizer is made from: its definition and the tokens that begin, end and fill up."""
        content = json.dumps([self._definition, self.bos_id, self.eos_id, self.pad_id])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows an embedding needs."""
        return max(self._ids.values()) + 1

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without a beginning or end token of its own.

        Args:
            text: Any string of Unicode characters.
            parse_special: Read the names of special tokens in `text` as those tokens.

        Raises:
            UserError: `text` holds half of a surrogate pair, which is no character.
        """
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """Token ids of each text, on all cores; see `encode`."""
        rust = self._markup if parse_special else self._plain
        try:
            return [encoding.ids for encoding in rust.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _check_unicode(text)
            raise

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return b"".join(self.token_bytes(token, skip_special_tokens) for token in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes that a token stands for; none for an invisible special token or an id without a token."""
        shown, hidden = self._bytes
        return shown.get(token_id, b"") or (b"" if skip_special_tokens else hidden.get(token_id, b""))

    def token(self, token_id: int) -> str:
        """A token's name as written in tokenizer.json."""
        return self._names[token_id]

    def token_id(self, token: str) -> int | None:
        """Id of the token called `token` in tokenizer.json, if there is one."""
        return self._ids.get(token)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self._ids.items()}

    @cached_property
    def _bytes(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Bytes of the tokens that decoding shows, and of the special ones that it hides."""
        alphabet = byte_alphabet()
        added = {token_id: token["content"].encode() for token_id, token in self._added.items()}
        hidden = {token_id: text for token_id, text in added.items() if self._added[token_id]["special"]}
        shown = {
            token_id: added.get(token_id) or bytes(alphabet[character] for character in name)
            for name, token_id in self._ids.items()
            if token_id not in hidden
        }
        return shown, hidden

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._definition)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary (Sennrich et al., arXiv 1508.07909) of exactly `vocab_size` ids from `texts`.

    Ids: the special tokens, the 256 bytes, then merges in the order they were learnt. Merges seen only once are not
    learnt; when the texts are too short to fill the vocabulary, placeholders that no text contains fill it, so that
    the model's shape does not depend on the corpus.

    Raises:
        UserError: `vocab_size` does not even hold the bytes and the special tokens.
    """
    TokenizerConfig(vocab_size).check()
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizer()
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    missing = vocab_size - rust.get_vocab_size()
    rust.add_special_tokens([PLACEHOLDER.format(index) for index in range(missing)])
    # Who encodes with special tokens, as transformers does by default, gets the beginning token the model was trained
    # with.
    rust.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B", [(BOS, 0)])
    fields = json.loads(rust.to_str())
    for token in fields["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE
    return Tokenizer(json.dumps(fields, ensure_ascii=False, indent=1))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds U+{ord(text[error.start]):04X} at character {error.start}",
            "half of a surrogate pair is no character and has no UTF-8 form",
            "read the text as UTF-8, or remove that character",
        ) from error
