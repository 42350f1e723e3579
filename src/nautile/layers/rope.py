"""Rotary position embedding, and how it is stretched over longer contexts.

A pair of dimensions i turns by the angle p·f_i at position p, with f_i = θ^(−2i/R) (arXiv 2104.09864). Extensions by a
factor s change the frequencies:

- linear (arXiv 2306.15595): f'_i = f_i/s.
- YaRN (arXiv 2309.00071 §3): slow frequencies are divided by s, fast ones kept, with a ramp between:

      f'_i = f_i·(1 − r_i) + (f_i/s)·r_i,   r_i = clamp((i − low)/(high − low), 0, 1)

  where low and high are the pairs that turn `beta_fast` and `beta_slow` times over the original context. The attention
  temperature is corrected by m(s, k) = 0.1·k·ln s + 1: cos and sin by m(s, mscale)/m(s, mscale_all_dim) and the
  softmax scale by m(s, mscale_all_dim)².
- llama3 (arXiv 2407.21783 §3.4.2): the same idea with the ramp over how often a pair turns within the original
  context: r_i = clamp((high_freq_factor − turns_i)/(high_freq_factor − low_freq_factor), 0, 1).
"""

import math

import torch
from torch import Tensor

from nautile.layers.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


def yarn_temperature(factor: float, mscale: float) -> float:
    """m(s, k) = 0.1·k·ln s + 1; 1 when the context is not extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """float32 [dim/2]: radians per position of each pair, on the CPU."""
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    plain = 1.0 / theta ** (pair / dim)
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    ramp = yarn_ramp(dim, theta, scaling) if isinstance(scaling, YarnScaling) else llama3_ramp(plain, scaling)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def yarn_ramp(dim: int, theta: float, yarn: YarnScaling) -> Tensor:
    """float32 [dim/2] in 0..1: how far each pair is slowed."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)


def llama3_ramp(frequencies_P: Tensor, llama3: Llama3Scaling) -> Tensor:
    """float32 [P] in 0..1: how far each pair is slowed."""
    turns_P = llama3.original_max_position_embeddings * frequencies_P / (2 * math.pi)
    return ((llama3.high_freq_factor - turns_P) / (llama3.high_freq_factor - llama3.low_freq_factor)).clamp(0, 1)


class Rope:
    """Angles of a head's rotated dimensions; chosen by the attention layer that uses it.

    Args:
        dim: Rotated dimensions R, even.
        theta: Base of the frequencies.
        scaling: Context extension, or None.
    """

    def __init__(self, dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.frequencies = frequencies(dim, theta, scaling)
        self.on_device: dict[torch.device, Tensor] = {}
        """Copies of the frequencies, one per device that asked, so that no layer copies them at every step."""
        self.amplitude = 1.0
        """Factor on cos and sin."""
        self.softmax_factor = 1.0
        """Factor on the softmax scale in latent attention; Llama and Qwen2 have none."""
        if isinstance(scaling, YarnScaling):
            all_dim = yarn_temperature(scaling.factor, scaling.mscale_all_dim)
            computed = yarn_temperature(scaling.factor, scaling.mscale) / all_dim
            self.amplitude = computed if scaling.attention_factor is None else scaling.attention_factor
            self.softmax_factor = all_dim**2

    def cos_sin(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [B, S, R/2], at int64 positions [B, S]."""
        angle_BSP = positions_BS[..., None].float() * self.frequencies_on(positions_BS.device)
        return angle_BSP.cos() * self.amplitude, angle_BSP.sin() * self.amplitude

    def frequencies_on(self, device: torch.device) -> Tensor:
        """The frequencies where the positions are."""
        if device.type == "cpu" or torch.compiler.is_compiling():
            return self.frequencies.to(device)
        if device not in self.on_device:
            with torch.inference_mode(False):  # whoever asks first, a backward may need them later
                self.on_device[device] = self.frequencies.to(device)
        return self.on_device[device]
