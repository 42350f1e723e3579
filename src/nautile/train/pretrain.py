"""Pre-training, as in the DeepSeek-V3 paper (arXiv 2412.19437, §2 and §4.2), and of V3.2's sparse attention."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from nautile.core.errors import NautileError
from nautile.core.log import progress
from nautile.core.run_folder import RunFolder
from nautile.data.prepare import PreparedData
from nautile.layers.moe import balance
from nautile.train import metrics
from nautile.train.begin import Session, already_finished, begin
from nautile.train.finish import Sampler, finish, validate, write_samples
from nautile.train.interrupt import stop_on_signals
from nautile.train.losses import Losses, pretrain_loss
from nautile.train.optim import clip_gradients_, set_learning_rate, train_only_indexers_
from nautile.train.precision import autocast
from nautile.train.recipe import PretrainRecipe
from nautile.train.schedule import StepSettings, settings_at
from nautile.train.state import TrainState


def pretrain(
    recipe: PretrainRecipe,
    run: RunFolder,
    data: PreparedData,
    sample: Sampler | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, validate, export to run/model, and return what run/summary.json holds.

    Args:
        recipe: The run. With `resume`, it must agree with the recorded one (`recipe.conflicts`).
        run: Folder of all records.
        data: Corpus and tokenizer, from `nautile.data.prepare`.
        sample: Called with the model in eval mode; writes sample texts.
        resume: Continue from the newest checkpoint of `run`, or from the start if it has none yet.

    Returns:
        The summary. Its "stopped_by" is None at the end of the run, else "stop_after" or the name of a signal; after a
        signal there is only a checkpoint, without the last validation and the export.

    Raises:
        UserError: the recipe contradicts the run, the data or this launch; another process trains in `run`.
        NautileError: the disk is full, or the gradient is not finite.
    """
    with run.resumable(), run.locked():
        if not resume:
            RunFolder.create(run.path)  # another process may have begun one since `run` was made
        return _pretrain(recipe, run, data, sample, resume)


def _pretrain(
    recipe: PretrainRecipe, run: RunFolder, data: PreparedData, sample: Sampler | None, resume: bool
) -> dict[str, Any]:
    if resume and (summary := already_finished(recipe, run)):
        return summary
    session = begin(recipe, run, data, resume)
    recipe, state = session.recipe, session.state
    steps, last = recipe.train.steps, min(recipe.train.steps, recipe.train.stop_after or recipe.train.steps)

    with stop_on_signals() as stop, progress("pre-training", total=steps, start=state.step) as bar:
        while state.step < last and not stop:
            started = time.perf_counter()
            settings = settings_at(recipe, state.step)

            train_only_indexers_(state.model, settings.index_stage == "warmup")
            losses = accumulate_gradients(recipe, state, session.device, settings)
            grad_norm, index_norm = clip_gradients_(state.model, recipe.optim.clip_norm)
            _require_finite(state.step + 1, losses.main, grad_norm, run)
            if index_norm is not None:
                _require_finite(state.step + 1, losses.index, index_norm, run, " in the indexers")

            set_learning_rate(state.optimizer, settings.lr)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)

            for router, counts_E in zip(state.model.routers(), losses.counts, strict=True):
                if router.e_score_correction_bias is not None:
                    balance.update_bias_(router.e_score_correction_bias, counts_E, settings.bias_speed)

            session.count_step(time.perf_counter() - started)
            bar.advance(1, _after_step(session, losses, (grad_norm, index_norm), settings, sample))

        session.save()
    stopped_by = stop.name or ("stop_after" if state.step < steps else None)
    return finish(session, sample, stopped_by)


def accumulate_gradients(
    recipe: PretrainRecipe, state: TrainState, device: torch.device, settings: StepSettings
) -> Losses:
    """Gradient of the step's whole batch, micro-batch by micro-batch; returns the losses and load of all of it."""
    micro_batches = recipe.train.batch_size // (recipe.train.micro_batch_size or recipe.train.batch_size)
    parts = []
    for _ in range(micro_batches):
        batch = next(state.loader)
        cu_seqlens = batch.cu_seqlens.to(device) if recipe.train.separate_documents else None
        with autocast(recipe.train.precision, device):
            losses = pretrain_loss(
                state.model,
                batch.tokens_BW.to(device),
                settings.mtp_weight,
                recipe.model.aux_loss_alpha,
                cu_seqlens,
                recipe.indexer.weight,
                settings.index_stage,
            )
        (losses.total / micro_batches).backward()
        parts.append(losses.detached())
    return metrics.merge(parts)


def _after_step(
    session: Session,
    losses: Losses,
    grad_norms: tuple[Tensor, Tensor | None],
    settings: StepSettings,
    sample: Sampler | None,
) -> str:
    """Whatever is due after this step: a line of metrics, validation, samples, a checkpoint. Returns the line."""
    cadence, step = session.recipe.train, session.state.step
    ended = step == cadence.steps  # `finish` validates and samples then, on more tokens
    text = ""
    line: dict[str, Any] = {"step": step}
    if step % cadence.log_every == 0 or step == 1 or ended:
        line |= metrics.measurements(losses, *grad_norms, settings, session.speed.read())
        text = metrics.log_line(line)
    if step % cadence.validate_every == 0 and not ended:
        line["val_bits_per_byte"] = validate(session, cadence.validation_tokens)
    if len(line) > 1:
        session.run.metrics.append(line | {"tokens": session.state.tokens})
    if step % cadence.sample_every == 0 and not ended:
        write_samples(session, sample)
    if step % cadence.checkpoint_every == 0:
        session.save()
    return text


def _require_finite(step: int, loss: Tensor, grad_norm: Tensor, run: RunFolder, whose: str = "") -> None:
    if not math.isfinite(grad_norm.item()):
        raise NautileError(
            f"step {step}: the gradient's norm{whose} is {grad_norm.item()}, the loss {loss.item()}",
            "an update with it would destroy the weights, so training stops before it",
            f"start again with a lower --optim.lr or more --schedule.warmup-steps; {run.path} keeps its checkpoints",
        )
