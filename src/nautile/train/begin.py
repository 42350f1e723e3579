"""What happens before the first step: automatic choices with their reasons, records, initial or resumed state."""

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from nautile.core.config import dump_yaml
from nautile.core.errors import UserError
from nautile.core.log import log, warn
from nautile.core.machine import measure_gemm_peak
from nautile.core.run_folder import RunFolder
from nautile.core.seed import seed_everything
from nautile.data.baselines import bigram_bits_per_byte, unigram_bits_per_byte
from nautile.data.loader import sequential_windows
from nautile.data.prepare import PreparedData
from nautile.ops import dispatch
from nautile.text.config import belongs
from nautile.train.checkpoint import checkpoints, load_checkpoint, remove_leftovers, save_checkpoint
from nautile.train.metrics import Speed, training_flops_per_token
from nautile.train.precision import resolve_device, resolve_precision, resolve_threads
from nautile.train.ranks import one_rank_only
from nautile.train.recipe import PretrainRecipe, conflicts, recorded_recipe
from nautile.train.start import start_from_
from nautile.train.state import TrainState, new_state
from nautile.train.validate import windows_within


@dataclass
class Session:
    """One stretch of a run, from its start or a checkpoint to where it ends or is stopped."""

    recipe: PretrainRecipe
    """With every automatic choice made."""
    run: RunFolder
    data: PreparedData
    device: torch.device
    state: TrainState
    speed: Speed
    facts: dict[str, Any]
    """What summary.json says from the start on: baselines, sizes, machine, backends."""
    _clock: float = field(default_factory=time.perf_counter)

    def count_step(self, seconds: float) -> None:
        """Count one step that took so long."""
        tokens = self.recipe.train.batch_size * self.recipe.train.sequence_length
        self.state.step += 1
        self.state.tokens += tokens
        self.speed.add(tokens, seconds)

    def count_time(self) -> None:
        """Add what has passed since the last call to the run's seconds."""
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now

    def save(self) -> None:
        """Write a checkpoint."""
        self.count_time()
        save_checkpoint(self.run, self.state, self.data.fingerprint, self.recipe.train.keep_checkpoints)


def begin(recipe: PretrainRecipe, run: RunFolder, data: PreparedData, resume: bool) -> Session:
    """Check all that can be checked, then build the state.

    Raises:
        UserError: several ranks, another recipe than the recorded one, a tokenizer of another vocabulary than the
            model's, held-out text that does not fill one window.
    """
    one_rank_only()
    recipe.check()
    _tokenizer_fits(recipe, data)
    sequential_windows(data.validation, recipe.train.sequence_length + 1)  # refuses a split that fills no window
    device, why_device = resolve_device(recipe.train.device)
    if resume:
        recipe = as_recorded(recipe, run)
    precision, why_precision = resolve_precision(recipe.train.precision, device)
    if resume:
        why_precision = "as the run began"
    threads, why_threads = resolve_threads(recipe.train.threads)
    torch.set_num_threads(threads)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision, threads=threads))
    if not resume:
        # stop_after belongs to this call, not to the run: resuming must not stop there again.
        dump_yaml(replace(recipe, train=replace(recipe.train, stop_after=None)), run.config_path)
    log(
        f"device {device} ({why_device}); precision {precision} ({why_precision}); "
        f"CPU threads {threads} ({why_threads})"
    )
    log(dispatch.summary(device, torch.float32 if precision == "fp32" else torch.bfloat16))
    if recipe.schedule.warmup_steps > recipe.train.steps:
        warn(f"the warm-up of {recipe.schedule.warmup_steps} steps outlasts the run of {recipe.train.steps}")

    seed_everything(recipe.seed)
    state = new_state(recipe, data, device)
    facts = _facts(recipe, data, state, device)
    if not (resume and checkpoints(run)) and recipe.start is not None:
        start_from_(state.model, recipe.start)
    if resume:
        _restore(run, state, data)
    run.write_env()  # last: a resume that is refused leaves the records as they are
    run.write_summary({**facts, "finished": False, "step": state.step})
    return Session(
        recipe=recipe,
        run=run,
        data=data,
        device=device,
        state=state,
        speed=Speed(facts["training_flops_per_token"]),
        facts=facts,
    )


def already_finished(recipe: PretrainRecipe, run: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None otherwise.

    Raises:
        UserError: another recipe than the recorded one.
    """
    as_recorded(recipe, run)
    summary = run.read_summary()
    if summary is None or not summary["finished"] or not run.model.is_dir():
        return None
    log(f"{run.path} is finished: {summary['step']} steps, {summary['val_bits_per_byte']:.3f} bits per byte")
    return summary


def as_recorded(recipe: PretrainRecipe, run: RunFolder) -> PretrainRecipe:
    """The recipe with the automatic choices of the recorded one, which it must agree with.

    Raises:
        UserError: another recipe than the recorded one.
    """
    recorded = recorded_recipe(run.config_path)
    if recipe.train.precision == "auto":
        recipe = replace(recipe, train=replace(recipe.train, precision=recorded.train.precision))
    if recipe.train.threads is None:
        recipe = replace(recipe, train=replace(recipe.train, threads=recorded.train.threads))
    if lines := conflicts(recorded, recipe):
        raise UserError(
            f"{run.path} was started with another recipe: {'; '.join(lines)}",
            "the run would not be the one that these values describe; intervals, stop_after and device may change",
            f"nautile pretrain --resume {run.path} without those flags, or a new run with --out",
        )
    return recipe


def _restore(run: RunFolder, state: TrainState, data: PreparedData) -> None:
    remove_leftovers(run)
    saved = checkpoints(run)
    if saved:
        load_checkpoint(saved[-1], state, data.fingerprint)
        log(f"resuming {run.path} after step {state.step}")
    else:
        log(f"{run.path} has no checkpoint yet: starting from step 0")
    run.truncate_metrics_after(state.step)


def _facts(recipe: PretrainRecipe, data: PreparedData, state: TrainState, device: torch.device) -> dict[str, Any]:
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    counted = data.train, data.validation, data.tokenizer.vocab_size
    # The very tokens that the last validation will score.
    windows = windows_within(data.validation, recipe.train.sequence_length, recipe.train.final_validation_tokens)
    targets = windows * recipe.train.sequence_length
    return {
        "name": recipe.name,
        "steps": recipe.train.steps,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "training_flops_per_token": training_flops_per_token(recipe.model, recipe.train.sequence_length),
        "unigram_bits_per_byte": unigram_bits_per_byte(*counted, targets),
        "bigram_bits_per_byte": bigram_bits_per_byte(*counted, targets),
        "tokens_per_byte": data.train.num_tokens / data.train.num_bytes,
        "data": _figures(data.report),
        "device": str(device),
        "precision": recipe.train.precision,
        "gemm_peak_gflops": measure_gemm_peak(dtype) if device.type == "cpu" else None,
        "backends": [asdict(choice) for choice in dispatch.choices(device, dtype)],
    }


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """The report's plain values, and those of both splits as "train tokens" and the like."""
    plain = {key: value for key, value in report.items() if not isinstance(value, dict | list)}
    splits = {f"{split} {key}": value for split in ("train", "validation") for key, value in report[split].items()}
    skipped = {f"left out: {reason}": found["count"] for reason, found in report["skipped"].items()}
    return plain | splits | skipped


def _tokenizer_fits(recipe: PretrainRecipe, data: PreparedData) -> None:
    model, ids = recipe.model, data.tokenizer.vocab_size
    if not belongs(ids, model.vocab_size):
        raise UserError(
            f"the tokenizer has {ids} tokens, model.vocab_size is {model.vocab_size}",
            "tokens beyond the model's vocabulary have no embedding"
            if ids > model.vocab_size
            else "the rows of the rest would never be trained",
            f"--model.vocab-size {ids}, or another tokenizer",
        )
    ends = data.tokenizer.bos_id, data.tokenizer.eos_id
    if ends != (model.bos_token_id, model.eos_token_id):
        raise UserError(
            f"the tokenizer begins documents with id {ends[0]} and ends them with {ends[1]}, the model's config says "
            f"{model.bos_token_id} and {model.eos_token_id}",
            "what is generated from the model begins and ends as its config says",
            f"--model.bos-token-id {ends[0]} --model.eos-token-id {ends[1]}",
        )
