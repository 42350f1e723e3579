"""`nautile.LLM`: prompts in, text out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from nautile.core.log import warn
from nautile.infer.advice import publishers_advice
from nautile.infer.answer import answer_of, pieces_of, several
from nautile.infer.completion import Completion, Output
from nautile.infer.defaults import ANSWER_TOKENS, NEUTRAL, Defaults, read_defaults, resolve
from nautile.infer.params import SamplingParams, paired
from nautile.infer.prompt import (
    ChatPrompt,
    Prompt,
    as_prompts,
    check_vocabulary,
    needs_tokenizer,
    room_after,
    to_chat_prompt,
    to_middle_prompt,
    to_token_ids,
)
from nautile.infer.run import run
from nautile.models.causal_lm import CausalLM
from nautile.models.family import read_config
from nautile.models.io import load_model, model_folder
from nautile.text.chat_template import ChatTemplate, find_template
from nautile.text.stream import IncrementalDecoder
from nautile.text.templates.messages import Message
from nautile.text.thinking import Piece
from nautile.text.tokenizer import Tokenizer


class LLM:
    """A model and its tokenizer, ready to continue text and to answer messages.

    Args:
        path_or_model: A model folder, a run folder, a repository of the Hugging Face Hub, or a model in memory (which
            is put into eval mode while it generates, and back afterwards).
        dtype: Type of the weights when loading from a folder: ``torch.bfloat16``, "bf16", ..., or "auto" for the one
            that config.json names; None for float32.
        tokenizer: Tokenizer to use. None takes the one in the folder; where there is none, prompts are token ids.
        device: Where to load the weights.
        max_batch: Prompts generated together; more of them wait.
        chat_template: Name of a built-in chat template to use instead of the model's own.
        allow_pickle: Take pickled ``pytorch_model.bin`` files where there are no safetensors; tensors only.

    Raises:
        UserError: No such model, type, device or chat template, or a tokenizer of another vocabulary.
    """

    def __init__(
        self,
        path_or_model: str | Path | CausalLM,
        dtype: torch.dtype | str | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        device: str | torch.device = "cpu",
        max_batch: int = 32,
        chat_template: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.folder: Path | None = None
        """Where the model came from; None for one in memory."""
        self.defaults = Defaults()
        """What its generation_config.json says."""
        if isinstance(path_or_model, str | Path):
            self.folder = folder = model_folder(path_or_model, allow_pickle)
            if tokenizer is None and (folder / "tokenizer.json").is_file():
                tokenizer = Tokenizer.load(folder)
            # Everything that may be refused comes before gigabytes of weights.
            self.defaults = read_defaults(folder)
            check_vocabulary(tokenizer, read_config(folder))
            self.template = template_of(tokenizer, folder, chat_template)
            self.model = load_model(folder, dtype, device, allow_pickle=allow_pickle)
        else:
            check_vocabulary(tokenizer, path_or_model.config)
            self.template = template_of(tokenizer, None, chat_template)
            self.model = path_or_model
        self.config, self.tokenizer, self.max_batch = self.model.config, tokenizer, max_batch
        self.advice = publishers_advice(self.folder, tokenizer, chat_template)
        """What the publisher of this model recommends, as far as its files tell which it is."""

    @property
    def default_params(self) -> SamplingParams:
        """Params of a `generate` that gives none: generation_config.json's, as in vLLM; neutral without one."""
        return self.defaults.params()

    @property
    def chat_params(self) -> SamplingParams:
        """Params of a `chat` that gives none, as ``nautile chat`` answers: see `sampling`."""
        return SamplingParams(**self.sampling({}, ANSWER_TOKENS)[0])  # type: ignore[arg-type]

    def sampling(self, given: Mapping[str, float | None], max_tokens: int) -> tuple[dict[str, float], str]:
        """Values for an answer, and a line that says where each comes from.

        What is `given` by hand counts first, then generation_config.json, then the publisher's advice, then
        temperature 0.7 and top_p 0.95; of a length that nobody names, `max_tokens`.
        """
        return resolve(given, [self.defaults, self.advice], {**NEUTRAL, "max_tokens": max_tokens})

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer.

        A model may have several: Llama 3 lists them in generation_config.json; DeepSeek-Coder-Instruct's tokenizer ends
        with ``<|EOT|>``, its config.json with the end of a document.
        """
        ids = {*self.config.eos_token_ids, *self.defaults.eos_ids}
        if self.tokenizer is not None:
            ids.add(self.tokenizer.eos_id)
        return frozenset(ids | (self.template.end_ids if self.template else set()))

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """One `Output` per prompt, in order. Prompts of different lengths do not influence each other.

        Args:
            prompts: One text, one list of token ids, or a list of either. An empty prompt becomes the
                begin-of-sentence token.
            params: For all prompts, or one each; None for `default_params`.

        Raises:
            UserError: A prompt that fills the context, ids outside the vocabulary, text without a tokenizer, or a
                number of params that is not that of the prompts.
        """
        listed = as_prompts(prompts)
        params = self.default_params if params is None else params
        each = paired(params, len(listed))
        ids = [to_token_ids(prompt, self.tokenizer, self.config) for prompt in listed]
        completions = [self._completion(prompt, param) for prompt, param in zip(ids, each, strict=True)]
        for start in range(0, len(ids), self.max_batch):
            part = slice(start, start + self.max_batch)
            for _ in run(self.model, ids[part], each[part], completions[part]):
                pass
        return [completion.output() for completion in completions]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Output: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Output]: ...
    def chat(
        self, messages: Any, params: Any = None, *, thinking: Any = None, tools: Any = ()
    ) -> Output | list[Output]:
        """The model's answer to a conversation, its reasoning apart from its text; to several, in order, a list.

        Args:
            messages: ``{"role": "user", "content": "..."}`` each; roles are system, user, assistant and tool. Or a
                list of such lists.
            params: None for `chat_params`, as far as it fits the context.
            thinking: Ask for an answer with reasoning or without; None for the template's own way.
            tools: Functions that the model may call, ``{"type": "function", "function": {...}}`` each.

        Raises:
            UserError: A base model, messages that its template does not accept, or a template that knows only one way
                of answering.
        """
        listed = messages if several(messages) else [messages]
        prompts = [self.chat_prompt(each, thinking=thinking, tools=tools) for each in listed]
        params = [self._fitting(prompt) for prompt in prompts] if params is None else params
        outputs = self.generate([prompt.ids for prompt in prompts], params)
        answers = [answer_of(output, prompt) for output, prompt in zip(outputs, prompts, strict=True)]
        return answers if several(messages) else answers[0]

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[Piece]:
        """The answer to one conversation in pieces as they become certain, each marked as reasoning or text.

        Arguments and errors are those of `chat`; errors are raised here, not at the first piece.
        """
        prompt = self.chat_prompt(messages, thinking=thinking, tools=tools)
        return pieces_of(self.stream(prompt.ids, params or self._fitting(prompt)), prompt)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> ChatPrompt:
        """What `chat` feeds the model; see there."""
        tokenizer = needs_tokenizer(self.tokenizer, "a conversation")
        return to_chat_prompt(messages, self.template, tokenizer, thinking, tools)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one answer in pieces, as they become certain: whole characters, never part of a stop string.

        Joined, the pieces are the text that `generate` returns. Errors are raised here, not at the first piece.
        """
        needs_tokenizer(self.tokenizer, "streaming text")
        params = params or self.default_params
        ids = to_token_ids(prompt, self.tokenizer, self.config)
        return run(self.model, [ids], [params], [self._completion(ids, params)])

    def middle_prompt(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask for the text between `prefix` and `suffix`."""
        return to_middle_prompt(prefix, suffix, needs_tokenizer(self.tokenizer, "filling a middle"))

    def complete_middle(self, prefix: str, suffix: str, params: SamplingParams | None = None) -> Output:
        """The text between `prefix` and `suffix`, by a model that was trained to fill in the middle (PSM order)."""
        return self.generate(self.middle_prompt(prefix, suffix), params)[0]

    def _fitting(self, prompt: ChatPrompt) -> SamplingParams:
        params, room = self.chat_params, room_after(prompt.ids, self.config.max_position_embeddings)
        return replace(params, max_tokens=min(params.max_tokens, room))

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
        return Completion(params, min(room, params.max_tokens), self.eos_ids, decoder)


def template_of(tokenizer: Tokenizer | None, folder: Path | None, name: str | None) -> ChatTemplate | None:
    """How messages become text; None for a base model, and for one that reads token ids only."""
    return None if tokenizer is None else find_template(folder, tokenizer, name)
