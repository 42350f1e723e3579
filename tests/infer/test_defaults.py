import json

import pytest

from nautile.core.errors import UserError
from nautile.infer.defaults import Defaults, read_defaults, resolve
from nautile.infer.params import SamplingParams

NEUTRAL = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 128}
R1 = Defaults({"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768}, "README of DeepSeek-R1")
NOTHING = {"temperature": None, "top_p": None, "top_k": None, "max_tokens": None}


def written(folder, fields):
    (folder / "generation_config.json").write_text(json.dumps(fields), "utf-8")
    return read_defaults(folder)


PUBLISHED = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "transformers_version": "4.46.3"}


@pytest.mark.parametrize(
    ("fields", "values", "eos"),
    [
        (PUBLISHED, {}, (1,)),
        (
            {**PUBLISHED, "do_sample": True, "temperature": 0.6, "top_p": 0.95},
            {"temperature": 0.6, "top_p": 0.95},
            (1,),
        ),
        ({"temperature": 0.3, "max_new_tokens": 2048}, {"temperature": 0.3, "max_tokens": 2048}, ()),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}, ()),
        ({"top_k": 20, "eos_token_id": [128001, 128008, 128009]}, {"top_k": 20}, (128001, 128008, 128009)),
        ({"top_k": -1, "top_p": None}, {"top_k": 0}, ()),
    ],
)
def test_what_published_files_say(tmp_path, fields, values, eos):
    defaults = written(tmp_path, fields)
    assert (dict(defaults.values), defaults.eos_ids, dict(defaults.not_applied)) == (values, eos, {})


def test_no_file_says_nothing(tmp_path):
    assert read_defaults(tmp_path) == Defaults()
    assert read_defaults(tmp_path).params() == SamplingParams()


def test_what_is_not_applied_is_named_unless_it_changes_nothing(tmp_path):
    silent = {"repetition_penalty": 1.0, "num_beams": 1, "min_p": 0.0, "suppress_tokens": None, "use_cache": True}
    loud = {"repetition_penalty": 1.05, "min_p": 0.05, "num_beams": 4, "max_length": 4096}
    assert written(tmp_path, silent).not_applied == {}
    assert written(tmp_path, {**loud, "temperature": 0.7}).not_applied == loud


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        ('{"temperature": "hot"}', "temperature 'hot' is not a number"),
        ('{"top_k": 2.5}', "top_k 2.5 is not an integer"),
        ('{"top_p": 1.5}', "top_p 1.5 is not possible"),
        ('{"temperature": -1}', "temperature -1 is not possible"),
        ('{"max_new_tokens": 0}', "max_tokens 0 is not possible"),
        ('{"temperature": NaN}', "temperature nan is not possible"),
        ('{"eos_token_id": "</s>"}', "eos_token_id '</s>' is not a token id or a list of them"),
        ('{"eos_token_id": [1, "2"]}', "eos_token_id [1, '2'] is not a token id"),
        ('{"eos_token_id": true}', "eos_token_id True is not a token id"),
        ('{"eos_token_id": {"id": 1}}', "is not a token id"),
    ],
)
def test_broken_files_are_named(tmp_path, text, what):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json") as raised:
        read_defaults(tmp_path)
    assert what in raised.value.what


FILE = "generation_config.json"


@pytest.mark.parametrize(
    ("given", "file", "values", "told"),
    [
        ({}, {}, (0.6, 0.95, 0, 32768), "temperature 0.6, top_p 0.95 (README of DeepSeek-R1)"),
        # The file decides alone: its silence on top_p is not filled from elsewhere.
        ({}, {"temperature": 0.3}, (0.3, 1.0, 0, 32768), f"temperature 0.3 ({FILE})"),
        ({}, {"max_tokens": 99}, (0.6, 0.95, 0, 99), "temperature 0.6, top_p 0.95 (README of DeepSeek-R1)"),
        ({"max_tokens": 7}, {"max_tokens": 99, "top_k": 5}, (1.0, 1.0, 5, 7), f"temperature 1, top_k 5 ({FILE})"),
        (
            {"temperature": 0.2},
            {"temperature": 0.9, "top_p": 0.8, "top_k": 20},
            (0.2, 0.8, 20, 32768),
            f"temperature 0.2 (as asked), top_p 0.8, top_k 20 ({FILE})",
        ),
        ({"top_p": 0.5}, {}, (0.6, 0.5, 0, 32768), "temperature 0.6 (README of DeepSeek-R1), top_p 0.5 (as asked)"),
        ({}, {"temperature": 0.0, "top_p": 0.9}, (0.0, 0.9, 0, 32768), f"greedy, temperature 0 ({FILE})"),
    ],
)
def test_who_decides(given, file, values, told):
    resolved, line = resolve({**NOTHING, **given}, [Defaults(file, FILE if file else ""), R1], NEUTRAL)
    assert tuple(resolved[name] for name in ("temperature", "top_p", "top_k", "max_tokens")) == values
    assert line == f"sampling: {told}"


def test_where_nobody_speaks_the_neutral_values_hold():
    resolved, line = resolve(NOTHING, [Defaults(), Defaults()], NEUTRAL)
    assert resolved == {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "max_tokens": 128}
    assert line == "sampling: temperature 0.7, top_p 0.95 (nautile's defaults)"
