"""The generation loop: several prompts of different lengths, one model, one cache.

Each prompt is read alone, in chunks; then all requests take one token per step together, each at its own position,
and leave the batch when they finish. B requests in the batch, S new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nautile.core.context import CacheView, ForwardContext
from nautile.infer.cache import KVCache
from nautile.infer.params import SamplingParams
from nautile.infer.sampling import Sampler
from nautile.models.causal_lm import CausalLM

PREFILL_CHUNK = 2048
"""Prompt tokens per forward: bounds the activations that exist at once, 0.5 GB of a V3 layer in float32."""


class Batch:
    """Requests that are generated together. Call `step` until `requests` is empty.

    Args:
        model: The model, in eval mode.
        prompts: Token ids of each request, at least one per prompt.
        params: Sampling of each request.
    """

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        weight = model.lm_head.weight
        self.model, self.device = model, weight.device
        self.prompts = prompts
        self.requests = list(range(len(prompts)))
        """Request of each row of the cache; finished ones are gone."""
        self.lengths = [0] * len(prompts)
        """Cached tokens of each row."""
        self.last_tokens: list[int] = []
        """Newest token of each row: sampled, not yet in the cache."""
        self.cache = KVCache(model.cache_specs(), len(prompts), weight.dtype, weight.device)
        self.sampler = Sampler(params, weight.device)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """The next (request, token id) of every request that is left; the first step reads the prompts."""
        logits_BV = self._decode() if self.last_tokens else self._prefill()
        self.last_tokens = self.sampler(logits_BV, self.requests)
        return list(zip(self.requests, self.last_tokens, strict=True))

    @torch.inference_mode()
    def finish(self, requests: set[int]) -> None:
        """Take requests out of the batch."""
        if not requests:
            return
        rows = [row for row, request in enumerate(self.requests) if request not in requests]
        self.requests = [self.requests[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.last_tokens = [self.last_tokens[row] for row in rows]
        self.cache.keep(rows)

    def _prefill(self) -> Tensor:
        return torch.cat([self._read_prompt(row, prompt) for row, prompt in enumerate(self.prompts)])

    def _read_prompt(self, row: int, prompt: Sequence[int]) -> Tensor:
        """Fill one row of the cache; logits [1, V] after the prompt's last token."""
        cache = self.cache.row(row)
        hidden_1SD = None
        for start in range(0, len(prompt), PREFILL_CHUNK):
            chunk = prompt[start : start + PREFILL_CHUNK]
            cache.reserve(start + len(chunk))
            hidden_1SD = self._forward([chunk], [start], cache)
        assert hidden_1SD is not None, "a prompt has at least one token"
        self.lengths[row] = len(prompt)
        return self._logits(hidden_1SD)

    def _decode(self) -> Tensor:
        """Feed every row's last token at its own position; logits [B, V]."""
        self.cache.reserve(max(self.lengths) + 1)
        hidden_B1D = self._forward([[token] for token in self.last_tokens], self.lengths, self.cache)
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits(hidden_B1D)

    def _forward(self, tokens: Sequence[Sequence[int]], starts: Sequence[int], cache: CacheView) -> Tensor:
        """Hidden states [B, S, D] of new tokens, row b beginning at position starts[b]."""
        tokens_BS = torch.tensor(tokens, device=self.device)
        starts_B1 = torch.tensor(starts, device=self.device)[:, None]
        positions_BS = starts_B1 + torch.arange(tokens_BS.shape[1], device=self.device)
        ctx = ForwardContext(tokens_BS, positions_BS, cache=cache, from_start=not any(starts))
        return self.model.hidden(ctx).hidden_BSD

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        """float32 logits after the last position: the head is the widest matrix, and earlier rows are not sampled."""
        return self.model.lm_head(hidden_BSD[:, -1]).float()
