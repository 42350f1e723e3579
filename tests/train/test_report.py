import re
from html.parser import HTMLParser

import pytest

from nautile.core.errors import UserError
from nautile.core.run_folder import RunFolder
from nautile.train.pretrain import pretrain
from nautile.train.report import render


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(straight):
    page = Page(render(straight).read_text("utf-8"))
    assert page.open == []
    assert len(page.links) == 6 and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    text = "".join(page.text)
    summary = straight.read_summary()
    assert f"{summary['val_bits_per_byte']:.3f} bits per byte" in text
    for said in ("causal_attention", "Expert load", "fp32", "nautile chat", " mean():"):
        assert said in text


def test_markdown_holds_the_figures_too(straight):
    render(straight)
    text = (straight.path / "report.md").read_text("utf-8")
    assert re.search(r"\| 4 \| \d\.\d{3} \|", text) and "⟦ mean():⟧" in text


def test_texts_of_the_model_are_escaped(recipe, data, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    pretrain(recipe, run, data, sample=lambda model: [{"prompt": "<b>", "text": "<script>x</script>"}])
    assert "<script>" not in render(run).read_text("utf-8")


def test_an_interrupted_run_and_one_without_experts_have_a_report(recipe, data, tmp_path):
    from dataclasses import replace

    dense = replace(recipe.model, first_k_dense_replace=2, num_nextn_predict_layers=0)
    run = RunFolder.create(tmp_path / "run")
    pretrain(replace(recipe, model=dense, train=replace(recipe.train, stop_after=2)), run, data)
    summary = run.read_summary()
    run.write_summary({k: v for k, v in summary.items() if k not in ("val_bits_per_byte", "next", "wall_seconds")})
    text = render(run).read_text("utf-8")
    assert "Not finished: 2 of 8 steps" in text and "--resume" in text and "Expert load" not in text


def test_a_run_without_steps_has_none(tmp_path):
    with pytest.raises(UserError, match="no steps to report"):
        render(RunFolder.create(tmp_path / "run"))
