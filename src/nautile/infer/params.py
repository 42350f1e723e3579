"""How a request wants its text: the knobs of sampling. No torch, so that command lines can show the defaults."""

from dataclasses import dataclass

from nautile.core.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next tokens, and when to stop."""

    max_tokens: int = 16
    """Most tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum (nucleus, 1904.09751)."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 for all. Cuts before top_p, as in transformers and vLLM."""
    seed: int | None = None
    """Seed of this request alone: the same prompt gives the same text in any batch. None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the text is cut before the first of them."""
    ignore_eos: bool = False
    """Go on after an end-of-sentence token, up to max_tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        rules = [
            (self.max_tokens >= 1, f"max_tokens {self.max_tokens}", "at least one token must be generated", "16"),
            (self.temperature >= 0, f"temperature {self.temperature}", "logits are divided by it", "0 for greedy, 1"),
            (0 < self.top_p <= 1, f"top_p {self.top_p}", "it is a probability greater than 0", "1 to keep every token"),
            (self.top_k >= 0, f"top_k {self.top_k}", "it counts tokens", "0 to keep every token"),
            (
                all(self.stop),
                f"stop {self.stop}",
                "an empty string ends every text at once",
                "strings that are not empty",
            ),
        ]
        for holds, what, why, cure in rules:
            if not holds:
                raise UserError(f"{what} is not possible", why, f"give {cure}")
