"""Validation, samples, and what remains when a run ends: exported model and summary."""

from collections.abc import Callable
from typing import Any

from nautile.core.log import log
from nautile.core.run_folder import atomic_folder
from nautile.models.causal_lm import CausalLM
from nautile.models.io import save_model
from nautile.train.begin import Session
from nautile.train.schedule import settings_at
from nautile.train.validate import bits_per_byte

Sampler = Callable[[CausalLM], list[dict[str, Any]]]
"""Model → texts it wrote, each with "prompt" and "text"; each becomes a line of samples.jsonl."""


def validate(session: Session, tokens: int) -> float:
    """Bits per byte over at most so many held-out tokens, said aloud beside the baselines."""
    recipe, facts = session.recipe, session.facts
    result = bits_per_byte(
        session.state.model,
        session.data.validation,
        recipe.train.sequence_length,
        tokens,
        recipe.train.precision,
        recipe.train.separate_documents,
        settings_at(recipe, max(session.state.step - 1, 0)).index_stage,
    )
    log(
        f"step {session.state.step}: {result:.3f} bits per byte on held-out text "
        f"(bigram {facts['bigram_bits_per_byte']:.3f}, unigram {facts['unigram_bits_per_byte']:.3f})"
    )
    return result


def write_samples(session: Session, sample: Sampler | None) -> None:
    """Let the model write, and keep what it wrote."""
    if sample is None:
        return
    model, step = session.state.model.eval(), session.state.step
    earlier = session.run.samples.read()
    if any(text["step"] == step for text in earlier):  # by a process that was killed before it could finish this step
        session.run.samples.keep([text for text in earlier if text["step"] != step])
    for text in sample(model):
        session.run.samples.append({"step": step, **text})
        log(f"  {text['prompt'][-40:]!r} → {text['text'][:80]!r}")
    model.train()


def finish(session: Session, sample: Sampler | None, stopped_by: str | None) -> dict[str, Any]:
    """Validate, sample, export to run/model and write run/summary.json; after a signal, only the summary."""
    run, state = session.run, session.state
    results: dict[str, Any] = {}
    if stopped_by in (None, "stop_after"):
        results["val_bits_per_byte"] = validate(session, session.recipe.train.final_validation_tokens)
        write_samples(session, sample)
        with atomic_folder(run.model) as folder:
            save_model(state.model, folder)
            session.data.tokenizer.save(folder)
    session.count_time()
    summary = {
        **session.facts,
        **results,
        **_averages(session),
        "wall_seconds": state.seconds,
        "tokens": state.tokens,
        "step": state.step,
        "finished": stopped_by is None,
        "stopped_by": stopped_by,
        "next": _next_commands(session, stopped_by),
    }
    run.write_summary(summary)
    return summary


def _averages(session: Session) -> dict[str, float | None]:
    """Speed and balance over the last quarter of the logged steps: start-up and the first imbalance are behind then."""
    lines = [line for line in session.run.read_metrics() if "loss" in line]
    lines = lines[-max(1, len(lines) // 4) :]
    loads = [load for line in lines for load in line["load_max_over_mean"]]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "loss": mean([line["loss"] for line in lines]),
        "tokens_per_second": mean([line["tokens_per_second"] for line in lines]),
        "gflops": mean([line["gflops"] for line in lines]),
        "load_max_over_mean": mean(loads),
    }


def _next_commands(session: Session, stopped_by: str | None) -> list[str]:
    path = session.run.path
    resume = [f"nautile pretrain --resume {path}"] if stopped_by else []
    exported = session.run.model.is_dir()
    talk = [f"nautile generate {path} 'def mean(values):'", f"nautile chat {path}"] if exported else []
    return [*resume, *talk]
