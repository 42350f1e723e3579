"""Each op as loops over scalars and rows, independent of the library: in float64, the judge of all backends."""

import torch
from torch import Tensor


def causal_attention(q, k, v, scale, document_ids=None) -> Tensor:
    B, S, H, _ = q.shape
    share = H // k.shape[2]
    rows = []
    for b in range(B):
        for i in range(S):
            seen = [j for j in range(i + 1) if document_ids is None or document_ids[b, j] == document_ids[b, i]]
            for h in range(H):
                scores = torch.stack([scale * torch.dot(q[b, i, h], k[b, j, h // share]) for j in seen])
                weights = torch.exp(scores - scores.max())
                rows.append((weights / weights.sum()) @ v[b, seen, h // share])
    return torch.stack(rows).view(B, S, H, -1)


def cached_attention(q, k, v, positions, scale, selected=None) -> Tensor:
    B, S, H, _ = q.shape
    share = H // k.shape[2]
    rows = []
    for b in range(B):
        for i in range(S):
            seen = [t for t in range(positions[b, i] + 1) if selected is None or selected[b, i, t]]
            for h in range(H):
                scores = torch.stack([scale * torch.dot(q[b, i, h], k[b, t, h // share]) for t in seen])
                rows.append(softmax(scores) @ v[b, seen, h // share])
    return torch.stack(rows).view(B, S, H, -1)


def latent_attention(q, q_rope, c, k_rope, positions, scale) -> Tensor:
    B, S, H, C = q.shape
    rows = []
    for b in range(B):
        for i in range(S):
            end = int(positions[b, i]) + 1
            for h in range(H):
                dots = [torch.dot(q[b, i, h], c[b, t]) + torch.dot(q_rope[b, i, h], k_rope[b, t]) for t in range(end)]
                rows.append(softmax(scale * torch.stack(dots)) @ c[b, :end])
    return torch.stack(rows).view(B, S, H, C)


def softmax(scores) -> Tensor:
    weights = torch.exp(scores - scores.max())
    return weights / weights.sum()


def grouped_swiglu(x, gate_up, down, experts, weights) -> Tensor:
    F = down.shape[2]
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(x.shape[1], dtype=x.dtype)
        for choice in range(experts.shape[1]):
            e = int(experts[t, choice])
            gate, up = gate_up[e, :F] @ x[t], gate_up[e, F:] @ x[t]
            row = row + weights[t, choice] * (down[e] @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(row)
    return torch.stack(rows) if rows else x * 1


def linear(x, weight, bias=None) -> Tensor:
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def gated_linear(x, gate, up) -> Tensor:
    return swiglu(linear(x, gate), linear(x, up))


def swiglu(gate, up) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def rms_norm(x, weight, eps) -> Tensor:
    return x * weight / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)


def rotate_interleaved(x, cos, sin) -> Tensor:
    out = torch.zeros_like(x)
    for pair in range(x.shape[-1] // 2):
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        c, s = cos[:, :, None, pair], sin[:, :, None, pair]
        out[..., 2 * pair] = a * c - b * s
        out[..., 2 * pair + 1] = a * s + b * c
    return out


def rotate_half_split(x, cos, sin) -> Tensor:
    out = torch.zeros_like(x)
    half = x.shape[-1] // 2
    for i in range(half):
        a, b = x[..., i], x[..., half + i]
        c, s = cos[:, :, None, i], sin[:, :, None, i]
        out[..., i] = a * c - b * s
        out[..., half + i] = a * s + b * c
    return out


def linear_cross_entropy(x, weight, targets, chunk) -> Tensor:
    total = (0 * x).sum()
    for row, target in zip(x, targets.tolist(), strict=True):
        if target != -100:
            logits = weight @ row
            total = total + torch.logsumexp(logits, 0) - logits[target]
    return total
