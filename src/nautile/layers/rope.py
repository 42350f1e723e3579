"""Rotary position embedding and its YaRN extension.

A pair of dimensions i turns by the angle p·f_i at position p, with f_i = θ^(−2i/R) (arXiv 2104.09864). YaRN (arXiv
2309.00071 §3) divides the slow frequencies by the extension factor s, keeps the fast ones, and ramps between:

    f'_i = f_i·(1 − r_i) + (f_i/s)·r_i,   r_i = clamp((i − low)/(high − low), 0, 1)

where low and high are the pairs that turn `beta_fast` and `beta_slow` times over the original context. The attention
temperature is corrected by m(s, k) = 0.1·k·ln s + 1: cos and sin by m(s, mscale)/m(s, mscale_all_dim) and the softmax
scale by m(s, mscale_all_dim)².
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class Yarn(Protocol):
    """The fields of a YaRN extension that the rotation needs."""

    @property
    def factor(self) -> float: ...

    @property
    def original_max_position_embeddings(self) -> int: ...

    @property
    def beta_fast(self) -> float: ...

    @property
    def beta_slow(self) -> float: ...

    @property
    def mscale(self) -> float: ...

    @property
    def mscale_all_dim(self) -> float: ...


def yarn_temperature(factor: float, mscale: float) -> float:
    """m(s, k) = 0.1·k·ln s + 1; 1 when the context is not extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """float32 [dim/2]: radians per position of each pair, on the CPU."""
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    plain = 1.0 / theta ** (pair / dim)
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


class Rope:
    """Angles of a head's rotated dimensions; chosen by the attention layer that uses it.

    Args:
        dim: Rotated dimensions R, even.
        theta: Base of the frequencies.
        yarn: Context extension, or None.
    """

    def __init__(self, dim: int, theta: float, yarn: Yarn | None = None) -> None:
        self.frequencies = frequencies(dim, theta, yarn)
        self.amplitude = 1.0
        """Factor on cos and sin."""
        self.softmax_factor = 1.0
        """Factor on the softmax scale."""
        if yarn is not None:
            all_dim = yarn_temperature(yarn.factor, yarn.mscale_all_dim)
            self.amplitude = yarn_temperature(yarn.factor, yarn.mscale) / all_dim
            self.softmax_factor = all_dim**2

    def cos_sin(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [B, S, R/2], at int64 positions [B, S]."""
        angle_BSP = positions_BS[..., None].float() * self.frequencies.to(positions_BS.device)
        return angle_BSP.cos() * self.amplitude, angle_BSP.sin() * self.amplitude
