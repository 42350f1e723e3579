"""A batch of requests from its first token to its last."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch

from nautile.infer.batch import Batch
from nautile.infer.completion import Completion
from nautile.infer.params import SamplingParams
from nautile.models.causal_lm import CausalLM


def run(
    model: CausalLM, prompts: list[list[int]], params: list[SamplingParams], completions: list[Completion]
) -> Iterator[str]:
    """Generate until every completion has finished; yields each new piece of text.

    Args:
        model: In eval mode while this runs, in the mode of before afterwards.
        prompts: Token ids of each request.
        params: How each request samples.
        completions: What takes each request's tokens.
    """
    with evaluating(model):
        batch = Batch(model, prompts, params)
        while batch.requests:
            for request, token_id in batch.step():
                piece = completions[request].push(token_id)
                if piece:
                    yield piece
            batch.finish({r for r in batch.requests if completions[r].finish_reason is not None})


@contextmanager
def evaluating(model: torch.nn.Module) -> Generator[None]:
    """Eval mode inside, the mode of before afterwards: a trainer may sample from the model that it trains."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
