"""The lightning indexer of DeepSeek sparse attention: which past tokens a query reads (DeepSeek-V3.2-Exp §2.1).

    q_j = RoPE(W_q c_q)_j,   k = RoPE(LayerNorm(W_k x)),   w = W_w x · J^−½ · I^−½
    I_st = Σ_j w_sj · relu(q_sj · k_t),   selected_s = top-k over t ≤ s of I_st

with c_q the query latent of the main attention. Three things differ from the main attention beside it, and weights
trained one way are useless the other way: the rotated dimensions come *first*, they are rotated as *two halves* instead
of neighbouring pairs, and the key is normalised by a LayerNorm.

B sequences, S queries, T keys, D model, L query latent, J indexer heads, I dimensions of one, K selected, P rope / 2.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nautile import ops
from nautile.layers.attention.index_fp8 import as_stored_in_fp8
from nautile.ops.precision import accumulate_dtype, no_autocast

KEY_EPS = 1e-6
"""Epsilon of the keys' LayerNorm, whatever `rms_norm_eps` says."""
SCORES_AT_ONCE = 1 << 22
"""Scores of one block of queries: 16 MiB in float32."""
QUERIES_AT_ONCE = 256
"""Queries of one block. Of a whole prompt, more would be scored against more positions after them."""


Source = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]
"""What an indexer chooses from: hidden states and query latents of the queries, index keys of the rows, angles."""


class Indexer(nn.Module):
    """Scores and selection. Attribute names are those of the published tensors.

    Inputs are detached: the language-model loss does not reach the indexer, which is trained by a loss of its own on
    `scores`, and that loss does not reach the rest of the model.

    Args:
        dim: Width D of the hidden state.
        q_lora_rank: Width L of the query latent.
        n_heads: Indexer heads J.
        head_dim: Dimensions I of one.
        rope_dim: How many of them, the first ones, are rotated.
        topk: Tokens that a query reads, at most.
        fp8: Round queries and keys as DeepSeek's code does before multiplying them (`index_fp8`).
    """

    keep_float32 = ("k_norm.weight", "k_norm.bias", "weights_proj.weight")
    """Parameters that stay float32 in a model of a narrower dtype."""

    def __init__(
        self, dim: int, q_lora_rank: int, n_heads: int, head_dim: int, *, rope_dim: int, topk: int, fp8: bool = False
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.rope_dim, self.topk, self.fp8 = n_heads, head_dim, rope_dim, topk, fp8
        self.wq_b = nn.Linear(q_lora_rank, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, head_dim, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, KEY_EPS)
        self.weights_proj = nn.Linear(dim, n_heads, bias=False)

    def keys(self, x_BSD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Index keys [B, S, I] of tokens: what the cache holds. `angles` are cos and sin [B, S, P]."""
        k_BSI = self.wk(x_BSD.detach())
        with no_autocast(k_BSI):
            wide = accumulate_dtype(k_BSI)
            weight, bias = self.k_norm.weight.to(wide), self.k_norm.bias.to(wide)
            normal_BSI = F.layer_norm(k_BSI.to(wide), (self.head_dim,), weight, bias, KEY_EPS).to(k_BSI.dtype)
        return self.place(normal_BSI[:, :, None], angles)[:, :, 0]

    def queries(self, c_q_BSL: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[B, S, J, I] from the query latent of the main attention."""
        return self.place(self.wq_b(c_q_BSL.detach()).unflatten(-1, (self.n_heads, -1)), angles)

    def place(self, x_BSJI: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the first dimensions as two halves; then, if asked for, round as the published code stores it."""
        turned_BSJR, rest = x_BSJI.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        x_BSJI = torch.cat([ops.rotate_half_split(turned_BSJR, *angles), rest], dim=-1)
        return as_stored_in_fp8(x_BSJI) if self.fp8 else x_BSJI

    def weights(self, x_BSD: Tensor) -> Tensor:
        """[B, S, J] in float32, of either sign, scaled by J^−½ · I^−½."""
        with no_autocast(x_BSD):
            wide = accumulate_dtype(x_BSD)
            weights_BSJ = F.linear(x_BSD.detach().to(wide), self.weights_proj.weight.to(wide))
        return weights_BSJ * (self.n_heads * self.head_dim) ** -0.5

    def scores(self, x_BSD: Tensor, c_q_BSL: Tensor, k_BTI: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """I_st, float32 [B, S, T], unmasked; differentiable in the indexer's own weights."""
        return ops.index_scores(self.queries(c_q_BSL, angles), k_BTI, self.weights(x_BSD))

    def loss(
        self, source: Source, q_BSHQ: Tensor, k_BSHQ: Tensor, scale: float, selected_BSS: Tensor | None,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """KL(p ‖ softmax(I)) per position: how far the scores are from the main attention (V3.2-Exp eq. 3 and 4).

        Args:
            source: What is scored.
            q_BSHQ: Queries of the main attention; they and its keys get no gradient.
            k_BSHQ: Its keys.
            scale: Factor on its scores.
            selected_BSS: What it reads; None for everything up to each position of its document.
            document_ids_BS: int64, equal within a document; None if there is one only, or with `selected_BSS`.
        """
        x_BSD, c_q_BSL, k_BSI, angles = source
        index = self.queries(c_q_BSL, angles), k_BSI, self.weights(x_BSD)
        total = ops.indexer_kl(*index, q_BSHQ, k_BSHQ, scale, selected_BSS, document_ids_BS)
        return total / x_BSD.shape[:2].numel()

    @torch.no_grad()
    def rows(
        self, x_BSD: Tensor, c_q_BSL: Tensor, k_BTI: Tensor, angles: tuple[Tensor, Tensor], seen_BST: Tensor
    ) -> Tensor:
        """Selected rows int64 [B, S, min(topk, T)], −1 in places that a query does not use.

        Args:
            x_BSD: Normalised hidden states of the queries.
            c_q_BSL: Their query latents.
            k_BTI: Index keys of all rows, from `keys`; unseen rows may hold anything.
            angles: cos and sin [B, S, P] of the queries' positions.
            seen_BST: Boolean: the rows each query may look at.
        """
        blocks = self._blocks(x_BSD, c_q_BSL, angles, k_BTI.shape[1])
        return torch.cat([self._best(q, weights, k_BTI, seen_BST[:, s]) for s, q, weights in blocks], dim=1)

    @torch.no_grad()
    def mask(
        self, x_BSD: Tensor, c_q_BSL: Tensor, k_BSI: Tensor, angles: tuple[Tensor, Tensor], seen_BSS: Tensor
    ) -> Tensor:
        """The same selection within whole sequences, as a boolean [B, S, S]; no query may see a later position."""
        B, S, _ = seen_BSS.shape
        # One column more, for the places that are not used.
        mask_BSX = torch.zeros(B, S, S + 1, dtype=torch.bool, device=seen_BSS.device)
        for s, q, weights in self._blocks(x_BSD, c_q_BSL, angles, S):
            rows_BSK = self._best(q, weights, k_BSI[:, : s.stop], seen_BSS[:, s, : s.stop])
            mask_BSX[:, s].scatter_(-1, rows_BSK.masked_fill(rows_BSK < 0, S), True)
        return mask_BSX[..., :S]

    def _blocks(
        self, x_BSD: Tensor, c_q_BSL: Tensor, angles: tuple[Tensor, Tensor], T: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Queries and weights of some positions after another: few scores exist at once, and few unseen ones."""
        q_BSJI, weights_BSJ = self.queries(c_q_BSL, angles), self.weights(x_BSD)
        B, S = weights_BSJ.shape[:2]
        step = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // (B * T)))
        for start in range(0, S, step):
            s = slice(start, min(start + step, S))
            yield s, q_BSJI[:, s], weights_BSJ[:, s]

    def _best(self, q_BSJI: Tensor, weights_BSJ: Tensor, k_BTI: Tensor, seen_BST: Tensor) -> Tensor:
        """The selected rows of these queries."""
        return ops.top_rows(ops.index_scores(q_BSJI, k_BTI, weights_BSJ), seen_BST, self.topk)
