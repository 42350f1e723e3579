"""Text from tokens as they arrive: a token may hold half a character, and half a character is never shown."""

import codecs

from nautile.text.tokenizer import Tokenizer


class IncrementalDecoder:
    """Joins the bytes of pushed tokens and gives them out as whole characters.

    All pieces pushed, and `flush` at the end, join to exactly ``tokenizer.decode(ids)``.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token; empty while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip))

    def flush(self) -> str:
        """What an incomplete last character reads as: U+FFFD, or nothing. The decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
