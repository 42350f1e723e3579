"""`nautile.LLM`: prompts in, text out."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsIndex

import torch

from nautile.core.errors import UserError
from nautile.core.log import warn
from nautile.infer.batch import Batch
from nautile.infer.completion import Completion, Output
from nautile.infer.params import SamplingParams
from nautile.infer.prompt import check_vocabulary, needs_tokenizer, room_after, to_middle_prompt, to_token_ids
from nautile.models.causal_lm import CausalLM
from nautile.models.family import read_config
from nautile.models.io import load_model, model_folder
from nautile.text.stream import IncrementalDecoder
from nautile.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids, which are fed as they are."""

DEFAULT_PARAMS = SamplingParams()


class LLM:
    """A model and its tokenizer, ready to continue text.

    Args:
        path_or_model: A model folder, a run folder, or a model in memory (which is put into eval mode while it
            generates, and back afterwards).
        dtype: Type of the weights when loading from a folder; None for float32.
        tokenizer: Tokenizer to use. None takes the one in the folder; where there is none, prompts are token ids.
        device: Where to load the weights.
        max_batch: Prompts generated together; more of them wait.

    Raises:
        UserError: No such model, or a tokenizer of another vocabulary.
    """

    def __init__(
        self,
        path_or_model: str | Path | CausalLM,
        dtype: torch.dtype | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        device: str | torch.device = "cpu",
        max_batch: int = 32,
    ) -> None:
        if isinstance(path_or_model, str | Path):
            folder = model_folder(path_or_model)
            if tokenizer is None and (folder / "tokenizer.json").is_file():
                tokenizer = Tokenizer.load(folder)
            check_vocabulary(tokenizer, read_config(folder))  # before gigabytes of weights are read
            self.model = load_model(folder, dtype, device)
        else:
            check_vocabulary(tokenizer, path_or_model.config)
            self.model = path_or_model
        self.config, self.tokenizer, self.max_batch = self.model.config, tokenizer, max_batch

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
    ) -> list[Output]:
        """One `Output` per prompt, in order. Prompts of different lengths do not influence each other.

        Args:
            prompts: One text, one list of token ids, or a list of either. An empty prompt becomes the
                begin-of-sentence token.
            params: For all prompts, or one each.

        Raises:
            UserError: A prompt that fills the context, ids outside the vocabulary, text without a tokenizer, or a
                number of params that is not that of the prompts.
        """
        listed = as_prompts(prompts)
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise UserError(
                f"{len(each)} sampling params for {len(listed)} prompts",
                "they are paired one to one",
                "give one SamplingParams for all prompts, or one for each",
            )
        ids = [to_token_ids(prompt, self.tokenizer, self.config) for prompt in listed]
        completions = [self._completion(prompt, param) for prompt, param in zip(ids, each, strict=True)]
        for start in range(0, len(ids), self.max_batch):
            part = slice(start, start + self.max_batch)
            for _ in self._run(ids[part], each[part], completions[part]):
                pass
        return [completion.output() for completion in completions]

    def stream(self, prompt: Prompt, params: SamplingParams = DEFAULT_PARAMS) -> Iterator[str]:
        """The text of one answer in pieces, as they become certain: whole characters, never part of a stop string.

        Joined, the pieces are the text that `generate` returns. Errors are raised here, not at the first piece.
        """
        needs_tokenizer(self.tokenizer, "streaming text")
        ids = to_token_ids(prompt, self.tokenizer, self.config)
        return self._run([ids], [params], [self._completion(ids, params)])

    def middle_prompt(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask for the text between `prefix` and `suffix`."""
        return to_middle_prompt(prefix, suffix, needs_tokenizer(self.tokenizer, "filling a middle"), self.config)

    def complete_middle(self, prefix: str, suffix: str, params: SamplingParams = DEFAULT_PARAMS) -> Output:
        """The text between `prefix` and `suffix`, by a model that was trained to fill in the middle (PSM order)."""
        return self.generate(self.middle_prompt(prefix, suffix), params)[0]

    def _completion(self, prompt: list[int], params: SamplingParams) -> Completion:
        if params.stop:
            needs_tokenizer(self.tokenizer, "a stop string")
        room = room_after(prompt, self.config.max_position_embeddings)
        if room < params.max_tokens:
            warn(
                f"max_tokens {params.max_tokens} reduced to {room}: the prompt has {len(prompt)} tokens "
                f"and the model's context is {self.config.max_position_embeddings}"
            )
        decoder = IncrementalDecoder(self.tokenizer) if self.tokenizer else None
        return Completion(params, min(room, params.max_tokens), self.config.eos_token_id, decoder)

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], completions: list[Completion]
    ) -> Iterator[str]:
        """Generate until every completion has finished; yields each new piece of text."""
        with evaluating(self.model):
            batch = Batch(self.model, prompts, params)
            while batch.requests:
                for request, token_id in batch.step():
                    piece = completions[request].push(token_id)
                    if piece:
                        yield piece
                batch.finish({r for r in batch.requests if completions[r].finish_reason is not None})


def as_prompts(prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[Prompt]:
    """A list of prompts, whether one or several were given: a flat list of ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    token_ids = [int(item) for item in prompts if isinstance(item, SupportsIndex)]
    return [token_ids] if token_ids else [item for item in prompts if not isinstance(item, SupportsIndex)]


@contextmanager
def evaluating(model: torch.nn.Module) -> Generator[None]:
    """Eval mode inside, the mode of before afterwards: a trainer may sample from the model that it trains."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
