"""The two verbs that talk, on a tiny random model."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nautile.cli import chat, generate, model_args
from nautile.cli.flags import parse
from nautile.cli.model_args import open_llm
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.models.io import save_model
from nautile.text.thinking import Piece
from nautile.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = DeepseekV3ForCausalLM(replace(V3_NANO, vocab_size=300, max_position_embeddings=64))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder / "model")
    train_tokenizer(["some text to learn from"], 300).save(folder / "model")
    return str(folder)


def test_streamed_and_whole_text_are_the_same(run, capsys):
    sampling = ["--max-tokens", "20", "--seed", "1", "--ignore-eos"]
    assert generate.main([run, "some text", *sampling]) == 0
    streamed = capsys.readouterr().out
    generate.main([run, "some text", *sampling, "--no-stream"])
    assert capsys.readouterr().out == streamed
    assert len(streamed) > 5


def test_a_dash_reads_standard_input(run, capsys, monkeypatch):
    sampling = ["--max-tokens", "8", "--seed", "1"]
    generate.main([run, "some text", *sampling])
    given = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("some text"))
    generate.main([run, "-", *sampling])
    assert capsys.readouterr().out == given


def test_standard_input_that_is_no_utf8_is_refused(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfcn"), "utf-8"))
    with pytest.raises(UserError, match="standard input is no UTF-8: byte 0xFC"):
        generate.main([run, "-"])


def test_the_middle_is_filled_and_depends_on_the_suffix(run, capsys):
    sampling = ["--max-tokens", "20", "--seed", "1", "--ignore-eos", "--temperature", "1.5"]
    texts = []
    for suffix in ("e", "from"):
        generate.main([run, "--prefix", "som", "--suffix", suffix, *sampling])
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("words", [[], ["text", "--prefix", "a"]])
def test_a_task_that_makes_no_sense_is_refused(run, words):
    with pytest.raises(UserError):
        generate.main([run, *words])


def scripted(*lines):
    """Lines as typed; an exception class is raised instead."""
    rest = iter([*lines, EOFError])

    def read_line():
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    return read_line


def test_chat_says_that_a_base_model_continues_and_obeys_commands(run, capsys, monkeypatch):
    monkeypatch.setattr(
        chat, "_read_line", lambda: scripted("text", "/history", "/reset", "/history", "/hlep", "/help")
    )
    assert chat.main([run, "--max-tokens", "5", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert "is a base model without a chat template: it continues your text" in err
    assert "[user] text" in out and "nothing was said yet" in out
    assert "did you mean '/help'?" in out and "forget it" in out


class Scripted:
    """A conversation whose answers are given."""

    def __init__(self, *pieces):
        self.pieces, self.heard, self.closed = pieces, [], False

    def reply(self, line):
        self.heard.append(line)
        try:
            for piece in self.pieces:
                if isinstance(piece, str):
                    yield Piece(piece)
                elif isinstance(piece, Piece):
                    yield piece
                else:
                    raise piece
        finally:
            self.closed = True


def test_ctrl_c_ends_the_answer_not_the_conversation(capsys):
    conversation = Scripted("half an ", KeyboardInterrupt())
    chat.talk(conversation, scripted("one", KeyboardInterrupt, "", "two", "/exit", "never read"))
    assert conversation.heard == ["one", "two"] and conversation.closed
    out = capsys.readouterr().out
    assert out.count("half an ") == 2 and "Ctrl-D or /exit leaves." in out


def test_a_refused_line_is_explained_and_the_conversation_goes_on(capsys):
    conversation = Scripted(UserError("the prompt has 99 tokens", "too many", "shorten it"))
    chat.talk(conversation, scripted("one", "two"))
    assert conversation.heard == ["one", "two"]
    assert capsys.readouterr().err.count("the prompt has 99 tokens") == 2


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_stop_strings_add_up_and_leave_the_prompt_alone(verb):
    cls = {"generate": generate.GenerateArgs, "chat": chat.ChatArgs}[verb]
    args = parse(cls, None, ["--stop", "a", "--stop", "b", "model"], f"nautile {verb}", "")
    assert (args.model, tuple(args.stop)) == ("model", ("a", "b"))
    assert parse(cls, None, ["model"], f"nautile {verb}", "").stop == ()


def test_reasoning_is_marked_in_a_pipe_and_dim_on_a_terminal(capsys, monkeypatch):
    turn = [Piece("so it ", reasoning=True), Piece("is", reasoning=True), Piece("four"), Piece(".")]
    chat.talk(Scripted(*turn), scripted("2+2?"))
    assert capsys.readouterr().out.startswith("[thinking] so it is\n[answer] four.\n")
    chat.talk(Scripted(Piece("four")), scripted("2+2?"))
    assert capsys.readouterr().out.startswith("four\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    chat.talk(Scripted(*turn), scripted("2+2?"))
    out = capsys.readouterr().out
    assert "\x1b[2mso it \x1b[0m" in out and "is\x1b[0m\n\nfour." in out and "[thinking]" not in out


def test_an_answer_that_ends_while_reasoning_says_so(capsys):
    chat.talk(Scripted(Piece("so", reasoning=True)), scripted("2+2?"))
    assert "--max-tokens" in capsys.readouterr().err


def altered(run, folder, generation=None, name="model"):
    """A copy of the run's model with a generation_config.json."""
    copy = folder / name
    copy.mkdir()
    for file in (Path(run) / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    return str(copy)


def test_sampling_comes_from_the_flags_then_the_folder_then_us(run, tmp_path, capsys):
    generate.main([run, "some", "--max-tokens", "3"])
    assert "sampling: temperature 0.7, top_p 0.95 (nautile's defaults)" in capsys.readouterr().err
    config = {"do_sample": True, "temperature": 0.4, "top_p": 0.8, "repetition_penalty": 1.05, "max_new_tokens": 3}
    model = altered(run, tmp_path, config)
    generate.main([model, "some", "--temperature", "0.1", "--ignore-eos"])
    err = capsys.readouterr().err
    assert "sampling: temperature 0.1 (as asked), top_p 0.8 (generation_config.json)" in err
    assert "repetition_penalty 1.05, which is not applied" in err
    greedy = altered(run, tmp_path, {"do_sample": False, "max_new_tokens": 6}, "greedy")
    texts = []
    for _ in range(2):
        generate.main([greedy, "some text", "--ignore-eos"])
        texts.append(capsys.readouterr())
    assert texts[0] == texts[1] and "sampling: greedy" in texts[0].err


def test_chat_says_which_template_answers_and_why(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat, "_read_line", lambda: scripted("hello"))
    named = altered(run, tmp_path, name="DeepSeek-V3.1-tiny")
    chat.main([named, "--max-tokens", "4", "--seed", "1", "--thinking", "on"])
    told = capsys.readouterr()
    assert "the built-in chat template v3.1 (the folder is called DeepSeek-V3.1-tiny)" in told.err
    assert "[thinking] " in told.out and "still reasoning" in told.err
    assert "temperature 0.6, top_p 0.95 (generation_config.json of DeepSeek-V3.1-Terminus)" in told.err
    chat.main([run, "--max-tokens", "4", "--chat-template", "coder"])
    told = capsys.readouterr()
    assert "the built-in chat template coder (asked for)" in told.err
    assert "sampling: greedy, temperature 0 (README of DeepSeek-Coder)" in told.err


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--chat-template", "v33"], "no built-in chat template is called 'v33'"),
        (["--chat-template", "r1", "--thinking", "off"], "knows only one way of answering"),
        (["--thinking", "on"], "--thinking on is for models that answer"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--device", "cpu:x"], "no device 'cpu:x'"),
        (["--top-p", "0"], "top_p 0.0 is not possible"),
        (["--dtype", "float32"], "float32"),
    ],
)
def test_impossible_wishes_are_refused(run, flags, what, monkeypatch):
    monkeypatch.setattr(chat, "_read_line", lambda: scripted())
    with pytest.raises(UserError) as raised:
        chat.main([run, *flags])
    assert what in str(raised.value)


def test_types_of_the_weights(run, tmp_path, capsys):
    for dtype in ("fp32", "bf16", "fp16", "auto"):
        assert generate.main([run, "some", "--max-tokens", "2", "--dtype", dtype]) == 0
    folder = Path(altered(run, tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    args = parse(generate.GenerateArgs, None, [str(folder), "a", "--dtype", "auto"], "nautile generate", "")
    assert open_llm(args).model.lm_head.weight.dtype is torch.bfloat16
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float8_e4m3fn"}))
    with pytest.raises(UserError, match="float8_e4m3fn is no type to run in"):
        open_llm(args)


def test_a_large_model_of_16_bits_says_what_float32_costs(run, tmp_path, capsys, monkeypatch):
    folder = Path(altered(run, tmp_path))
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(model_args, "LARGE", 1000)

    def told(said, *flags):
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        generate.main([str(folder), "some", "--max-tokens", "2", *flags])
        return capsys.readouterr().err

    assert told({"torch_dtype": "bfloat16"}).count("as float32; --dtype bf16, as they are published, takes") == 1
    assert "--dtype fp16" in told({"torch_dtype": None, "dtype": "float16"})
    for said, flags in (({"torch_dtype": "float32"}, []), ({"torch_dtype": "bfloat16"}, ["--dtype", "bf16"])):
        assert "--dtype" not in told(said, *flags)
    monkeypatch.setattr(model_args, "LARGE", 4e9)
    assert "--dtype" not in told({"torch_dtype": "bfloat16"})


def test_pickled_weights_are_read_when_allowed(run, tmp_path, capsys):
    folder = Path(altered(run, tmp_path))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--allow-pickle"):
        generate.main([str(folder), "some"])
    assert generate.main([str(folder), "some", "--allow-pickle", "--max-tokens", "2"]) == 0


def test_in_a_pipe_only_answers_are_on_stdout(run, capsys, monkeypatch):
    monkeypatch.setattr(chat, "_read_line", lambda: scripted())
    chat.main([run, "--temperature", "0"])
    told = capsys.readouterr()
    assert told.out.strip() == "" and "continues your text" in told.err and "/help shows" in told.err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    chat.main([run, "--temperature", "0"])
    told = capsys.readouterr()
    assert "continues your text" in told.out and "/help" not in told.err


def test_a_line_that_is_no_utf8_is_refused_with_its_place(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grün\r\n".encode() + b"\n\xc3\xbc gr\xfcn\nlast")))
    read_line = chat._read_line()
    conversation = Scripted("four")
    chat.talk(conversation, read_line)
    assert conversation.heard == ["grün", "last"]
    assert "byte 6 of the line, 0xFC, is no UTF-8" in capsys.readouterr().err
    strict = UnicodeDecodeError("utf-8", b"gr\xfcn", 2, 3, "invalid start byte")  # a terminal's
    chat.talk(conversation, scripted(strict, "on"))
    assert conversation.heard[2:] == ["on"]
    assert "byte 3 of the line, 0xFC, is no UTF-8" in capsys.readouterr().err
