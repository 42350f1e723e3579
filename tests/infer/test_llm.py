"""Generation against the full forward pass of the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nautile.core.errors import UserError
from nautile.infer import batch as batch_module
from nautile.infer.completion import Completion, Output
from nautile.infer.defaults import Defaults
from nautile.infer.llm import LLM
from nautile.infer.params import SamplingParams
from nautile.infer.prompt import as_prompts
from nautile.text.stream import IncrementalDecoder
from nautile.text.thinking import join
from nautile.text.tokenizer import train_tokenizer

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
RAGGED = [[5, 17, 200], [33], [250, 8, 91, 4, 77, 120, 9], [12, 12]]


@torch.no_grad()
def greedy_by_full_forward(model, prompt, steps):
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None}, {"topk_method": "greedy", "scoring_func": "softmax"}])
def test_incremental_greedy_equals_the_full_forward(make_model, change):
    model = make_model(seed=3, **change)
    for prompt in RAGGED:
        got = LLM(model).generate([prompt], GREEDY)[0]
        assert got.token_ids == greedy_by_full_forward(model, prompt, 12)
        assert (got.finish_reason, got.text) == ("length", "")


def test_prompts_of_different_lengths_do_not_influence_each_other(model):
    together = LLM(model).generate(RAGGED, GREEDY)
    assert [out.token_ids for out in together] == [LLM(model).generate(p, GREEDY)[0].token_ids for p in RAGGED]
    assert len({tuple(out.token_ids) for out in together}) > 1
    in_turn = LLM(model, max_batch=2).generate(RAGGED, GREEDY)
    assert in_turn == together


def test_requests_leave_the_batch_at_different_times(model):
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (7, 1, 12, 3)]
    together = LLM(model).generate(RAGGED, params)
    for prompt, one, out in zip(RAGGED, params, together, strict=True):
        assert out.token_ids == greedy_by_full_forward(model, prompt, one.max_tokens)


def test_long_prompts_are_read_in_chunks(model, monkeypatch):
    prompt = [(7 * i) % 300 for i in range(40)]
    whole = LLM(model).generate(prompt, GREEDY)
    monkeypatch.setattr(batch_module, "PREFILL_CHUNK", 7)
    assert LLM(model).generate(prompt, GREEDY) == whole


def test_a_seeded_request_is_the_same_alone_and_in_a_batch(model):
    params = SamplingParams(max_tokens=12, seed=11, ignore_eos=True)
    together = LLM(model).generate(RAGGED, params)
    assert [LLM(model).generate(p, params)[0] for p in RAGGED] == together
    assert LLM(model).generate(RAGGED, SamplingParams(max_tokens=12, seed=12, ignore_eos=True)) != together


def test_a_training_model_is_handed_back_training_and_can_train_on(make_model):
    model = make_model().train()
    LLM(model).generate([[1]], GREEDY)
    assert model.training
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in model.model.parameters())


def test_bfloat16_weights_generate(folder):
    llm = LLM(folder, dtype=torch.bfloat16)
    assert llm.model.lm_head.weight.dtype == torch.bfloat16
    alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in RAGGED]
    assert [len(tokens) for tokens in alone] == [12] * 4
    # The absorbed form rounds elsewhere than the full forward: a token may differ where two nearly tie, and at times
    # a rounding sends a token to another expert.
    gaps = []
    for prompt, tokens in zip(RAGGED, alone, strict=True):
        with torch.no_grad():
            logits = llm.model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps += ((logits.amax(1) - chosen) / logits.std()).tolist()
    assert sum(gap < 0.05 for gap in gaps) >= 0.9 * len(gaps)


def test_eos_ends_an_answer_unless_ignored(make_model):
    prompt, model = RAGGED[0], make_model(seed=3)
    tokens = greedy_by_full_forward(model, prompt, 12)
    ends_at = tokens.index(tokens[6])
    model = make_model(seed=3, eos_token_id=tokens[6])
    out = LLM(model).generate(prompt, SamplingParams(max_tokens=12, temperature=0.0))[0]
    assert (out.token_ids, out.finish_reason) == (tokens[: ends_at + 1], "stop")
    assert LLM(model).generate(prompt, GREEDY)[0].token_ids == tokens


def test_every_end_token_ends_an_answer(make_model, tokenizer, monkeypatch):
    prompt, model = RAGGED[0], make_model(seed=3)
    tokens = greedy_by_full_forward(model, prompt, 12)
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    for place in (2, 6):
        llm = LLM(make_model(seed=3, eos_token_id=(tokens[place], 299)))  # Llama 3 has a list in config.json
        assert llm.generate(prompt, greedy)[0].token_ids == tokens[: tokens.index(tokens[place]) + 1]
        llm = LLM(make_model(seed=3, eos_token_id=299))
        llm.defaults = Defaults(eos_ids=(298, tokens[place]))  # and in generation_config.json
        assert llm.generate(prompt, greedy)[0].token_ids == tokens[: tokens.index(tokens[place]) + 1]
    llm = LLM(make_model(seed=3, eos_token_id=299), tokenizer=tokenizer)
    assert llm.eos_ids == {299, tokenizer.eos_id}
    monkeypatch.setattr(tokenizer, "eos_id", tokens[2])  # and DeepSeek-Coder's tokenizer has <|EOT|>
    assert llm.generate(prompt, greedy)[0].token_ids == tokens[: tokens.index(tokens[2]) + 1]


def test_a_text_begins_as_its_tokenizer_says(folder, model, tokenizer, monkeypatch):
    llm = LLM(folder)
    monkeypatch.setattr(llm.tokenizer, "adds_bos", False)
    assert llm.generate("fox", GREEDY)[0].token_ids == greedy_by_full_forward(model, tokenizer.encode("fox"), 12)
    assert llm.middle_prompt("a", "b")[0] == tokenizer.fim_begin_id
    empty = greedy_by_full_forward(model, [tokenizer.bos_id], 12)  # there must be something to read
    assert [out.token_ids for out in llm.generate(["", []], GREEDY)] == [empty, empty]


def test_an_empty_prompt_without_a_begin_token_is_refused(make_model):
    with pytest.raises(UserError, match="no token that begins a text"):
        LLM(make_model(bos_token_id=None)).generate([[]], GREEDY)


def test_a_folders_generation_config_is_the_default(model, tokenizer, tmp_path):
    from nautile.models.io import save_model

    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    assert LLM(tmp_path).default_params == SamplingParams()
    config = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": [250, 251]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path)
    assert llm.default_params == SamplingParams(max_tokens=5, temperature=0.0)
    assert llm.eos_ids == {1, 250, 251}
    out = llm.generate(RAGGED[0])[0]
    assert out == llm.generate(RAGGED[0], SamplingParams(max_tokens=5, temperature=0.0))[0]
    assert "".join(llm.stream(RAGGED[0])) == out.text
    assert llm.generate(RAGGED[0], SamplingParams(max_tokens=2, ignore_eos=True, seed=1))[0].finish_reason == "length"


def test_chat_answers_messages(folder, tokenizer):
    llm = LLM(folder, chat_template="v3.1")
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=2, ignore_eos=True)
    user, assistant = tokenizer.token_id("<｜User｜>"), tokenizer.token_id("<｜Assistant｜>")
    think, closed = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    hello = [{"role": "user", "content": "the"}]
    ids = [0, user, *tokenizer.encode("the"), assistant]
    plain = llm.chat(hello, params)
    assert plain == llm.generate([[*ids, closed]], params)[0]
    thinking = llm.chat(hello, params, thinking=True)
    assert (thinking.text, thinking.reasoning) == ("", llm.generate([[*ids, think]], params)[0].text.strip())


def test_reasoning_is_parted_from_the_answer(folder, tokenizer, monkeypatch):
    llm = LLM(folder, chat_template="r1")
    written = Output("so\n</think>\n\nfour", [5, 6], "stop")
    monkeypatch.setattr(llm, "generate", lambda prompts, params: [written])
    assert llm.chat([{"role": "user", "content": "2+2"}]) == Output("four", [5, 6], "stop", reasoning="so")


def test_a_base_model_and_one_without_a_tokenizer_do_not_chat(folder, model):
    hello = [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match="base model without a chat template"):
        LLM(folder).chat(hello)
    with pytest.raises(UserError, match="a conversation needs a tokenizer"):
        LLM(model).chat(hello)
    with pytest.raises(UserError, match="no built-in chat template is called 'v4'"):
        LLM(folder, chat_template="v4")


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user", "content": "hi"}, ["hi"], [{"content": "hi"}]])
def test_what_is_no_conversation_is_refused(folder, messages):
    with pytest.raises(UserError, match="is no conversation"):
        LLM(folder, chat_template="v3").chat(messages)


def test_a_run_folder_gives_text_and_streams_the_same(folder, tokenizer):
    llm = LLM(folder)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True)
    out = llm.generate("the quick", params)[0]
    assert out.text == tokenizer.decode(out.token_ids)
    pieces = list(llm.stream("the quick", params))
    assert "".join(pieces) == out.text and len(pieces) > 5


def test_text_prompts_begin_with_bos_and_an_empty_one_is_bos(folder, tokenizer, model):
    llm = LLM(folder)
    with_bos = [model.config.bos_token_id, *tokenizer.encode("fox")]
    assert llm.generate("fox", GREEDY)[0].token_ids == greedy_by_full_forward(model, with_bos, 12)
    empty = greedy_by_full_forward(model, [model.config.bos_token_id], 12)
    assert [out.token_ids for out in llm.generate(["", []], GREEDY)] == [empty, empty]


def test_the_text_is_cut_before_a_stop_string_wherever_tokens_split_it(folder):
    llm = LLM(folder)
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True)
    text = llm.generate("the", free)[0].text
    for start, end in [(3, 5), (10, 16), (20, 21)]:
        stop = text[start:end]
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True, stop=(stop,))
        out = llm.generate("the", params)[0]
        assert (out.text, out.finish_reason) == (text[: text.index(stop)], "stop")
        assert "".join(llm.stream("the", params)) == out.text


def test_the_rest_of_an_unfinished_character_is_shown_at_the_end(tokenizer):
    tokens = [token for token in tokenizer.encode("aé") if token]
    cut = tokens[:-1] if len(tokens) > 2 else [tokenizer.encode("a")[0], tokenizer.token_id("Ã")]
    completion = Completion(SamplingParams(max_tokens=len(cut)), len(cut), (), IncrementalDecoder(tokenizer))
    pieces = [completion.push(token) for token in cut]
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert completion.output().finish_reason == "length"


def test_fill_in_the_middle_asks_in_psm_order(folder, tokenizer, model):
    llm = LLM(folder)
    ids = llm.middle_prompt("def add(", "return a")
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    assert ids == [0, begin, *tokenizer.encode("def add("), hole, *tokenizer.encode("return a"), end]
    assert llm.complete_middle("def add(", "return a", GREEDY).token_ids == greedy_by_full_forward(model, ids, 12)


def test_what_does_not_fit_the_context_is_clipped_or_refused(model, capsys):
    llm = LLM(model)
    out = llm.generate([[1] * 60], SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True))[0]
    assert (len(out.token_ids), out.finish_reason) == (4, "length")
    assert "max_tokens 10 reduced to 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="the prompt has 64 tokens") as raised:
        llm.generate([[1] * 64])
    assert len(str(raised.value).splitlines()) == 3


def test_without_a_tokenizer_text_is_refused_and_ids_work(model):
    llm = LLM(model)
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.generate([1], SamplingParams(stop="x")),
        lambda: llm.stream([1]),
        lambda: llm.complete_middle("a", "b"),
    ):
        with pytest.raises(UserError, match="needs a tokenizer"):
            call()
    with pytest.raises(UserError, match="token id 300 is not in the vocabulary"):
        llm.generate([[1, 300]])


@pytest.mark.parametrize("size", [280, 320])
def test_the_tokenizer_of_another_model_is_refused(model, size):
    with pytest.raises(UserError, match=f"{size} token ids, the model's embedding 300 rows"):
        LLM(model, tokenizer=train_tokenizer(["some text"], size))


def test_a_few_padding_rows_are_no_mismatch(model):
    tokenizer = train_tokenizer(["some text"], 294)
    assert tokenizer.vocab_size < model.config.vocab_size
    assert LLM(model, tokenizer=tokenizer).tokenizer is tokenizer


def test_prompts_in_every_form():
    assert as_prompts("a") == ["a"]
    assert as_prompts(["a", "b"]) == ["a", "b"]
    assert as_prompts([1, 2]) == [[1, 2]]
    assert as_prompts([[1], [2, 3]]) == [[1], [2, 3]]
    assert as_prompts([]) == []


@pytest.mark.parametrize(
    ("prompts", "what"),
    [
        (torch.tensor([5, 17]), "the prompts are of type Tensor"),
        (torch.tensor([[5, 17]]), "the prompts are of type Tensor"),
        ([torch.tensor([5, 17])], "a prompt is of type Tensor"),
        ([torch.tensor(5), torch.tensor(17)], "a prompt is of type Tensor"),
        ([[5, torch.tensor(17)]], "which is of type Tensor"),
        ([5, "a"], "a prompt is of type int"),
        ([[5, 1.0]], "a prompt holds '1.0', which is of type float"),
        ([[5, True]], "which is of type bool"),
        ([[[5]]], "which is of type list"),
        (None, "the prompts are of type NoneType"),
        (b"text", "the prompts are of type bytes"),
        ({"prompt": "text"}, "the prompts are of type dict"),
    ],
)
def test_what_is_no_prompt_is_refused(model, prompts, what):
    with pytest.raises(UserError) as raised:
        LLM(model).generate(prompts, GREEDY)
    assert what in raised.value.what


def test_ids_of_numpy_are_ids(model):
    numpy = pytest.importorskip("numpy")
    same = LLM(model).generate([RAGGED[0]], GREEDY)
    assert LLM(model).generate(list(numpy.array(RAGGED[0])), GREEDY) == same
    assert LLM(model).generate([tuple(RAGGED[0])], GREEDY) == same


def test_a_type_by_its_name(folder):
    assert LLM(folder, "bfloat16").model.lm_head.weight.dtype is torch.bfloat16
    assert LLM(folder, dtype="auto").model.lm_head.weight.dtype is torch.float32
    with pytest.raises(UserError, match="'int4' is no type to run in"):
        LLM(folder, dtype="int4")


def test_pickled_weights_are_taken_when_allowed(folder, tmp_path):
    weights = load_file(folder / "model" / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / "model" / file).read_bytes())
    with pytest.raises(UserError):
        LLM(tmp_path)
    same = LLM(folder).generate(RAGGED, GREEDY)
    assert LLM(tmp_path, allow_pickle=True).generate(RAGGED, GREEDY) == same


def copied(folder, tmp_path, name, generation=None):
    copy = tmp_path / name
    copy.mkdir()
    for file in (folder / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    return LLM(copy)


def test_who_decides_how_a_chat_is_sampled(folder, tmp_path):
    r1 = copied(folder, tmp_path, "DeepSeek-R1")
    assert r1.chat_params == SamplingParams(temperature=0.6, top_p=0.95, max_tokens=32768)
    assert r1.default_params == SamplingParams()  # of a text to continue nobody spoke
    own = copied(folder, tmp_path, "DeepSeek-R1-0528", {"temperature": 0.3})
    assert own.chat_params == SamplingParams(temperature=0.3, max_tokens=32768)
    nobody = LLM(folder, chat_template="v3.1")
    assert (nobody.chat_params.temperature, nobody.chat_params.max_tokens) == (0.6, 2048)
    assert LLM(folder).chat_params == SamplingParams(temperature=0.7, top_p=0.95, max_tokens=2048)


def test_an_answer_nobody_limits_may_fill_the_context(folder, tmp_path, capsys):
    llm = copied(folder, tmp_path, "DeepSeek-V3", {"do_sample": False, "eos_token_id": 1})
    hello = [{"role": "user", "content": "the"}]
    prompt = llm.chat_prompt(hello)
    output = llm.chat(hello)
    assert output.finish_reason == "stop" or len(output.token_ids) == 64 - len(prompt.ids) > 16
    assert "reduced" not in capsys.readouterr().err


def test_several_conversations_at_once(folder):
    llm = LLM(folder, chat_template="v3.1")
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=2, ignore_eos=True)
    one, two = [{"role": "user", "content": "the"}], [{"role": "user", "content": [{"type": "text", "text": "fox"}]}]
    alone = [llm.chat(each, params, thinking=True) for each in (one, two)]
    assert llm.chat([one, two], params, thinking=True) == alone
    assert llm.chat((one,), params, thinking=True) == alone[:1]
    short = SamplingParams(max_tokens=2, seed=2, ignore_eos=True)
    assert [len(output.token_ids) for output in llm.chat([one, two], [params, short])] == [9, 2]
    for wrong in ([one, []], [[]], [one, two[0]]):
        with pytest.raises(UserError, match="is no conversation"):
            llm.chat(wrong, params)


def test_a_streamed_chat_is_the_same_answer(folder, capsys):
    llm = LLM(folder, chat_template="v3.1")
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    hello = [{"role": "user", "content": "the"}]
    for thinking in (True, False):
        whole = llm.chat(hello, params, thinking=thinking)
        pieces = list(llm.chat_stream(hello, params, thinking=thinking))
        assert join(pieces) == (whole.reasoning, whole.text) and len(pieces) > 2
        assert all(piece.reasoning == thinking for piece in pieces)
    assert list(llm.chat_stream(hello))  # without params, too
    assert capsys.readouterr().err.count("still reasoning") == 1
    with pytest.raises(UserError, match="is no conversation"):
        llm.chat_stream([])


def test_params_that_do_not_pair_with_the_prompts_are_refused(model):
    with pytest.raises(UserError, match="2 sampling params for 1 prompts"):
        LLM(model).generate([RAGGED[0]], [GREEDY, GREEDY])
    with pytest.raises(UserError, match="sampling params are of type dict"):
        LLM(model).generate([RAGGED[0]], [{"temperature": 0}])
