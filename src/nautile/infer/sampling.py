"""Choosing the next token of each request from its logits.

B requests, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nautile.infer.params import SamplingParams

__all__ = ["Sampler", "SamplingParams", "next_token_probabilities"]


def next_token_probabilities(logits_V: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """float64 [V] distribution to draw the next token from; tokens that are cut off have exactly 0.

    p = softmax(logits / temperature). Of the tokens in order of falling p the first `top_k` stay, and of these, with
    their p made to sum to 1 again, the nucleus: the shortest prefix whose sum reaches `top_p`. It is never empty, and
    of equal tokens the one with the smaller id comes first. float64, because the sum over a vocabulary of 10⁵ float32
    numbers is off by more than what decides whether a token at the edge belongs.

    Args:
        logits_V: [V].
        temperature: Above 0.
        top_p: In (0, 1].
        top_k: 0 for all tokens.
    """
    logits_V = logits_V.double()
    # Subtract before dividing: a tiny temperature then gives −inf where it must, never inf − inf.
    p_V = ((logits_V - logits_V.max()) / temperature).softmax(dim=-1)
    if top_p == 1 and top_k == 0:
        return p_V
    sorted_V, order_V = p_V.sort(descending=True, stable=True)
    if top_k:
        sorted_V[top_k:] = 0.0
        sorted_V /= sorted_V.sum()
    if top_p < 1:
        before_V = sorted_V.cumsum(0) - sorted_V
        sorted_V = sorted_V.masked_fill(before_V >= top_p, 0.0)
    return torch.zeros_like(p_V).scatter_(0, order_V, sorted_V / sorted_V.sum())


class Sampler:
    """Draws the next tokens of a batch, each request from its own generator: a request's draws do not depend on others.

    Args:
        params: One per request. A seed of None draws one from torch's global generator.
        device: Where the logits will be.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self.params = list(params)
        self.generators = [_generator(p.seed, device) for p in self.params]

    def __call__(self, logits_BV: Tensor, requests: Sequence[int]) -> list[int]:
        """Token ids for the rows of `logits_BV`, which belong to `requests` (indices into the params), in order."""
        greedy_B = logits_BV.argmax(dim=-1).tolist()
        return [
            greedy if self.params[request].temperature == 0 else self._draw(logits_V, request)
            for greedy, logits_V, request in zip(greedy_B, logits_BV, requests, strict=True)
        ]

    def _draw(self, logits_V: Tensor, request: int) -> int:
        params = self.params[request]
        p_V = next_token_probabilities(logits_V, params.temperature, params.top_p, params.top_k)
        return int(torch.multinomial(p_V, 1, generator=self.generators[request]))


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    fresh = int(torch.randint(2**62, ())) if seed is None else seed
    return torch.Generator(device).manual_seed(fresh)
