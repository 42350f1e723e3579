"""The two verbs that talk, on a tiny random model."""

import io
from dataclasses import replace

import pytest
import torch

from nautile.cli import chat, generate
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.models.io import save_model
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
    out = capsys.readouterr().out
    assert "base model" in out.splitlines()[0] and "continues" in out.splitlines()[0]
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
    from nautile.cli.flags import parse

    cls = {"generate": generate.GenerateArgs, "chat": chat.ChatArgs}[verb]
    args = parse(cls, None, ["--stop", "a", "--stop", "b", "model"], f"nautile {verb}", "")
    assert (args.model, tuple(args.stop)) == ("model", ("a", "b"))
    assert parse(cls, None, ["model"], f"nautile {verb}", "").stop == ()
