"""What must hold between the fields of a recipe: conditions, each with what to tell where it fails."""

from typing import TYPE_CHECKING

from nautile.models.deepseek_v32.config import DeepseekV32Config
from nautile.text.config import belongs

if TYPE_CHECKING:
    from nautile.train.recipe import PretrainRecipe

Rule = tuple[bool, str, str, str]
"""Whether it holds; else what is wrong, why, and the cure."""


def rules(r: "PretrainRecipe") -> list[Rule]:
    """All of them."""
    t, s = r.train, r.schedule
    micro = t.batch_size if t.micro_batch_size is None else t.micro_batch_size
    counts = {
        "train.steps": t.steps,
        "train.batch_size": t.batch_size,
        "train.micro_batch_size": micro,
        "train.sequence_length": t.sequence_length,
        "train.log_every": t.log_every,
        "train.validate_every": t.validate_every,
        "train.validation_tokens": t.validation_tokens,
        "train.final_validation_tokens": t.final_validation_tokens,
        "train.sample_every": t.sample_every,
        "train.checkpoint_every": t.checkpoint_every,
        "train.keep_checkpoints": t.keep_checkpoints,
        "train.threads": 1 if t.threads is None else t.threads,
        "train.stop_after": 1 if t.stop_after is None else t.stop_after,
    }
    places = (s.constant_until, s.cosine_until, s.floor_until)
    fractions = [*places, *s.decay_at, r.mtp.switch_at, r.balance.bias_until]
    fractions += [r.indexer.dense_until, r.indexer.warmup_until]
    shares = {
        "schedule.floor": s.floor,
        "schedule.final": s.final,
        "schedule.decay_factor": s.decay_factor,
    }
    weights = [r.optim.weight_decay, r.mtp.weight, r.mtp.final_weight, r.balance.bias_speed, r.indexer.weight]
    stretches = (r.indexer.dense_until, r.indexer.warmup_until)
    return [
        *(
            (n > 0, f"{name} is {n}", "it counts something that must happen", "give at least 1")
            for name, n in counts.items()
        ),
        (
            t.batch_size % max(micro, 1) == 0,
            f"train.micro_batch_size {micro} does not divide train.batch_size {t.batch_size}",
            "every forward pass of a step takes equally many sequences",
            f"use a divisor of {t.batch_size}",
        ),
        (
            t.sequence_length <= r.model.max_position_embeddings,
            f"train.sequence_length {t.sequence_length} exceeds model.max_position_embeddings "
            f"{r.model.max_position_embeddings}",
            "the model has no positions there",
            f"--train.sequence-length {r.model.max_position_embeddings}, or a larger model.max_position_embeddings",
        ),
        (
            t.sequence_length > r.model.num_nextn_predict_layers,
            f"train.sequence_length {t.sequence_length} leaves nothing for "
            f"{r.model.num_nextn_predict_layers} MTP modules to predict",
            "module k predicts k + 1 tokens ahead",
            "use longer sequences",
        ),
        (
            r.start is None or bool(r.tokenizer.path),
            f"start is {r.start}, and tokenizer.path is not given",
            "a model knows the tokens it was trained on, no others",
            f"--tokenizer.path {r.start}",
        ),
        (
            r.tokenizer.vocab_size <= r.model.vocab_size,
            f"tokenizer.vocab_size {r.tokenizer.vocab_size} exceeds model.vocab_size {r.model.vocab_size}",
            "some tokens would have no embedding",
            f"--tokenizer.vocab-size {r.model.vocab_size}",
        ),
        (
            bool(r.tokenizer.path) or belongs(r.tokenizer.vocab_size, r.model.vocab_size),
            f"tokenizer.vocab_size {r.tokenizer.vocab_size} is far below model.vocab_size {r.model.vocab_size}",
            "the rows of the rest would never be trained, and the model could not be told from another tokenizer's",
            f"--model.vocab-size {r.tokenizer.vocab_size}, or --tokenizer.vocab-size {r.model.vocab_size}",
        ),
        (
            all(0 <= x <= 1 for x in fractions),
            "a place in schedule, mtp, balance or indexer lies outside 0..1: "
            f"{[x for x in fractions if not 0 <= x <= 1]}",
            "places are fractions of train.steps",
            "give a number between 0 and 1",
        ),
        (
            list(places) == sorted(places) and list(s.decay_at) == sorted(s.decay_at),
            f"the schedule's places are out of order: {places}, decay_at {s.decay_at}",
            "each stretch of the learning rate begins where the one before it ends",
            "order constant_until <= cosine_until <= floor_until, and decay_at",
        ),
        (
            stretches == (0.0, 0.0) or isinstance(r.model, DeepseekV32Config),
            f"indexer.dense_until is {stretches[0]}, indexer.warmup_until {stretches[1]}, and the model "
            f"{r.model.MODEL_TYPE}",
            "it has no indexers",
            "leave the section indexer out, or take a model of V3.2, such as the recipe v32-nano's",
        ),
        (
            stretches[0] <= stretches[1] or stretches[1] == 0.0,
            f"indexer.dense_until {stretches[0]} lies after indexer.warmup_until {stretches[1]}",
            "the warm-up begins where the dense stretch ends",
            f"indexer.warmup_until {stretches[0]} for none, or more",
        ),
        (
            r.indexer.warmup_lr > 0,
            f"indexer.warmup_lr is {r.indexer.warmup_lr}",
            "it must be positive",
            "V3.2 took 1e-3",
        ),
        *(
            (0 <= x <= 1, f"{name} is {x}", "it is a fraction of the learning rate", "give a number between 0 and 1")
            for name, x in shares.items()
        ),
        *(
            (
                0 <= x < 1,
                f"{name} is {x}",
                "it is the share of itself that a running mean keeps at every step",
                "give a number from 0 to below 1, e.g. 0.9",
            )
            for name, x in (("optim.beta1", r.optim.beta1), ("optim.beta2", r.optim.beta2))
        ),
        (
            r.optim.eps > 0,
            f"optim.eps is {r.optim.eps}",
            "it keeps the update finite where a gradient has been zero",
            "give a small positive number, e.g. 1e-8",
        ),
        (
            r.optim.lr > 0 and r.optim.clip_norm > 0 and s.warmup_steps >= 0,
            f"optim.lr {r.optim.lr}, optim.clip_norm {r.optim.clip_norm}, schedule.warmup_steps {s.warmup_steps}",
            "lr and clip_norm must be positive, warmup_steps not negative",
            "correct the value",
        ),
        (
            min(weights) >= 0,
            f"a weight is negative: {min(weights)}",
            "weight_decay, mtp and indexer weights, bias_speed and alpha push one way only",
            "use 0 to switch one off",
        ),
    ]
