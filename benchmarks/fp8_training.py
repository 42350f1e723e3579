"""Training with FP8 products beside bfloat16, and without what makes FP8 work.

    python benchmarks/fp8_training.py > benchmarks/results/fp8_training.json

One small DeepSeek-V3 with every mechanism, the same initial weights and the same tokens in each run:

- bf16: the baseline; fp32 beside it says how much of a difference rounding alone makes.
- fp8: ``train.precision: fp8``, the recipe of V3 §3.3.
- no promotion: sums stay in the tensor cores' accumulator over the whole of K. Of each partial sum over 32 products
  the 14 leading bits are kept, as V3 §3.3.2 and §3.5.2 describe Hopper's.
- tensor scales: one scale per activation, gradient, weight and expert instead of one per 128 numbers.

What is compared is the mean loss over the last steps; relative differences are to bf16. Beside it, the error of one
product of random normal numbers in each arithmetic, at growing K: a small model's sums are short, and so is what it
loses without promotion. Runs on a CPU, where FP8 is emulated with the same numbers. One JSON document on stdout.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nautile import ops
from nautile.core.machine import describe
from nautile.core.seed import seed_everything
from nautile.data.config import DataConfig
from nautile.data.prepare import PreparedData, prepare
from nautile.layers.moe.balance import update_bias_
from nautile.models.deepseek_v3.config import V3_MICRO
from nautile.ops import fp8_recipe
from nautile.ops.fp8_products import ROWS
from nautile.ops.fp8_tensor import LARGEST, Block, Fp8Tensor
from nautile.ops.numerics import calc_diff
from nautile.ops.reference import fp8_products
from nautile.text.config import TokenizerConfig
from nautile.train.optim import clip_gradient_, set_learning_rate
from nautile.train.precision import Precision
from nautile.train.pretrain import accumulate_gradients
from nautile.train.recipe import OptimConfig, PretrainRecipe, ScheduleConfig, TrainConfig
from nautile.train.schedule import settings_at
from nautile.train.state import new_state

MODEL = replace(
    V3_MICRO,
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=3,
    n_routed_experts=8,
    num_experts_per_tok=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    max_position_embeddings=512,
    initializer_range=0.0317,
)
LENGTHS = (128, 512, 2048, 8192)
"""K of the products of random numbers."""


def main() -> None:
    """Train in every arithmetic and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last", type=int, default=50, help="steps at the end over which the loss is averaged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default="runs/data", help="where the corpus is kept")
    parser.add_argument("--only", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = recipe_of(args)
    data = prepare(recipe.data, recipe.tokenizer)
    runs = {name: train(name, recipe, data) for name in args.only}
    document = {
        "benchmark": "fp8_training",
        "commit": commit(),
        "machine": describe(),
        "threads": args.threads,
        "model": asdict(MODEL),
        "train": asdict(recipe.train),
        "runs": {name: compared(run, runs.get("bf16"), args.last) for name, run in runs.items()},
        "product_error": {name: product_errors(name) for name in ("fp8", "no promotion", "tensor scales")},
    }
    json.dump(document, sys.stdout, indent=2)
    print()


def recipe_of(args: argparse.Namespace) -> PretrainRecipe:
    """The run that all arithmetics share."""
    return PretrainRecipe(
        name="fp8-training",
        model=MODEL,
        tokenizer=TokenizerConfig(vocab_size=MODEL.vocab_size),
        data=DataConfig(max_megabytes=2.0, cache=args.cache),
        optim=OptimConfig(lr=5e-4),
        schedule=ScheduleConfig(warmup_steps=20),
        train=TrainConfig(
            steps=args.steps, batch_size=4, sequence_length=128, device="cpu", precision="bf16", threads=args.threads
        ),
    )


def train(name: str, recipe: PretrainRecipe, data: PreparedData) -> dict[str, Any]:
    """Losses of a run from its beginning, as `nautile.train.pretrain` takes its steps, and its seconds per step."""
    precision: Precision = "bf16" if name == "bf16" else "fp32" if name == "fp32" else "fp8"
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    seed_everything(recipe.seed)
    state = new_state(recipe, data, torch.device("cpu"))
    losses, seconds = [], []
    with ARITHMETIC[name]():
        for step in range(recipe.train.steps):
            started = time.perf_counter()
            settings = settings_at(recipe, step)
            found = accumulate_gradients(recipe, state, torch.device("cpu"), settings)
            clip_gradient_(state.model.parameters(), recipe.optim.clip_norm)
            set_learning_rate(state.optimizer, settings.lr)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            for router, counts_E in zip(state.model.routers(), found.counts, strict=True):
                if router.e_score_correction_bias is not None:
                    update_bias_(router.e_score_correction_bias, counts_E, settings.bias_speed)
            losses.append(found.main.item())
            seconds.append(time.perf_counter() - started)
            if (step + 1) % 50 == 0:
                print(f"{name}: step {step + 1}, loss {losses[-1]:.4f}, {seconds[-1]:.2f} s", file=sys.stderr)
    return {"loss": losses, "seconds_per_step": sorted(seconds)[len(seconds) // 2]}


def compared(run: dict[str, Any], baseline: dict[str, Any] | None, last: int) -> dict[str, Any]:
    """A run's figures, and how its loss lies to the baseline's."""
    losses = run["loss"]
    row = {
        "mean_loss_of_last_steps": sum(losses[-last:]) / last,
        "seconds_per_step": round(run["seconds_per_step"], 3),
        "loss": [round(loss, 5) for loss in losses],
    }
    if baseline is not None:
        want = baseline["loss"]
        row["relative_difference"] = sum(losses[-last:]) / sum(want[-last:]) - 1
        # Of means over ten steps: single steps differ by what their own roundings happen to do.
        tens = [sum(losses[i : i + 10]) / sum(want[i : i + 10]) - 1 for i in range(0, len(losses), 10)]
        row["largest_relative_difference_of_ten_steps"] = max(tens, key=abs)
    return row


# --- what the recipe is compared with -----------------------------------------------------------------------------


def accumulate_in_tensor_cores(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``A·Bᵀ`` with a 14-bit accumulator: the sum after every 32 products loses the bits below, towards zero."""
    sum_MN = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0])
    with torch.autocast("cpu", enabled=False):
        for k in range(0, a_MK.shape[1], 32):
            sum_MN.addmm_(a_MK[:, k : k + 32], b_NK[:, k : k + 32].t())
            sum_MN.view(torch.int32).bitwise_and_(~((1 << 10) - 1))  # 24 bits with the implicit one, 10 of them cleared
    return sum_MN


def one_scale(x: Tensor, block: Block, ue8m0: bool = False) -> Fp8Tensor:
    """`x` in FP8 with one scale for each of its matrices, repeated in every block."""
    x = x.detach().float()
    scale = x.abs().amax((-2, -1), keepdim=True).clamp(min=1e-4) / LARGEST
    data = (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    grid = [-(-size // step) for size, step in zip(x.shape[-2:], block, strict=True)]
    return fp8_recipe._whole(Fp8Tensor(data.contiguous(), scale.expand(*x.shape[:-2], *grid).contiguous(), block))


@contextmanager
def without_promotion() -> Iterator[None]:
    """Products of the reference accumulate as in tensor cores."""
    with ops.use("reference"), patch.object(fp8_products, "product", accumulate_in_tensor_cores):
        yield


def turned(x: Fp8Tensor, D: int) -> Fp8Tensor:
    """xᵀ [D, R]: the same numbers under the same scale."""
    grid = (-(-x.shape[1] // ROWS[0]), -(-x.shape[0] // ROWS[1]))
    scale = x.scale[:1, :1].expand(grid).contiguous()
    return fp8_recipe._first_rows(fp8_recipe._whole(Fp8Tensor(x.data.t().contiguous(), scale, ROWS)), D)


@contextmanager
def with_tensor_scales() -> Iterator[None]:
    """Layers quantise with one scale."""
    with patch.object(fp8_recipe, "_quantized", one_scale), patch.object(fp8_recipe, "turned_activation", turned):
        yield


ARITHMETIC = {
    "bf16": nullcontext,
    "fp8": nullcontext,
    "no promotion": without_promotion,
    "tensor scales": with_tensor_scales,
    "fp32": nullcontext,
}
"""Name of a run → the context it trains in."""


def product_errors(name: str) -> list[dict[str, float]]:
    """Errors of A·Bᵀ of random numbers at growing K: of quantisation and sums together, and of the sums alone.

    Rows of A differ in size by up to 10⁵, as the gradients of tokens do; `diff` is the mean over rows, so that small
    ones count.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for K in LENGTHS:
        size_M1 = 10.0 ** -torch.linspace(0, 5, 64)[:, None]
        a, b = torch.randn(64, K, generator=generator) * size_M1, torch.randn(64, K, generator=generator)
        with ARITHMETIC[name]():
            a8, b8 = fp8_recipe.activation(a), fp8_recipe.weight(b)
            got = ops.fp8_gemm(a8, b8, dtype=torch.float32).double()
        exact = a8.dequantize(torch.float64) @ b8.dequantize(torch.float64).t()
        wanted = a.double() @ b.double().t()
        largest_M = exact.abs().amax(1).clamp(min=1e-30)
        rows.append(
            {
                "K": K,
                "diff": sum(calc_diff(x, y) for x, y in zip(got, wanted, strict=True)) / len(got),
                "largest_relative_error_of_sums": ((got - exact).abs().amax(1) / largest_M).max().item(),
            }
        )
    return rows


def commit() -> str:
    """The commit that this file belongs to, with a mark if the tree has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
