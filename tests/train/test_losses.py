from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.train.losses import pretrain_loss
from nautile.train.metrics import load_imbalance, merge

TINY = replace(V3_NANO, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def model():
    model = DeepseekV3ForCausalLM(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.train()


@pytest.fixture(scope="module")
def tokens_BW():
    return torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))


def test_main_loss_is_the_mean_cross_entropy(model, tokens_BW):
    logits_BSV = model(tokens_BW[:, :-1])
    expected = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BW[:, 1:].flatten())
    torch.testing.assert_close(pretrain_loss(model, tokens_BW, 0.3, 0.0).main, expected.detach())


def test_mtp_loss_divides_by_all_positions_of_the_sequence(model, tokens_BW):
    losses = pretrain_loss(model, tokens_BW, 0.3, 0.0)
    S = tokens_BW.shape[1] - 1
    for depth, logits in enumerate(model.mtp_logits(tokens_BW), start=1):
        # mtp_logits reads the last token of the window as an input, too; what it says there has no target.
        scored = logits[:, : S - depth].flatten(0, 1)
        nats = F.cross_entropy(scored, tokens_BW[:, 1 + depth :].flatten(), reduction="sum")
        torch.testing.assert_close(losses.mtp[depth - 1], (nats / (3 * S)).detach())


def test_total_is_the_papers_sum(model, tokens_BW):
    losses = pretrain_loss(model, tokens_BW, 0.3, 0.01)
    expected = losses.main + 0.3 / 2 * losses.mtp.sum() + 0.01 * losses.balance
    torch.testing.assert_close(losses.total.detach(), expected)


def test_counts_follow_the_routers(model, tokens_BW):
    losses = pretrain_loss(model, tokens_BW, 0.3, 0.0)
    assert len(losses.counts) == len(model.routers()) == 1 + 2  # one MoE layer, two MTP modules
    assert [int(c.sum()) for c in losses.counts] == [3 * 11 * TINY.num_experts_per_tok] * 3


def test_without_mtp_there_is_no_mtp_loss(tokens_BW):
    model = DeepseekV3ForCausalLM(replace(TINY, num_nextn_predict_layers=0))
    model.init_weights(torch.Generator().manual_seed(0))
    losses = pretrain_loss(model.train(), tokens_BW, 0.3, 0.0)
    assert losses.mtp.numel() == 0
    torch.testing.assert_close(losses.total.detach(), losses.main)


def test_micro_batches_add_up_to_the_batch(model, tokens_BW):
    def gradient(rows):
        model.zero_grad()
        parts = [pretrain_loss(model, row, 0.3, 1e-2) for row in rows]
        for part in parts:
            (part.total / len(rows)).backward()
        return [p.grad.clone() for p in model.parameters()], merge([part.detached() for part in parts])

    whole, losses = gradient([tokens_BW])
    split, merged = gradient(list(tokens_BW.split(1)))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.total, merged.total)
    assert all(torch.equal(a, b) for a, b in zip(losses.counts, merged.counts, strict=True))


def test_document_boundaries_change_the_loss_only_when_given(model, tokens_BW):
    cu_seqlens = torch.tensor([0, 5, 11, 22, 33])
    plain = pretrain_loss(model, tokens_BW, 0.3, 0.0).main
    apart = pretrain_loss(model, tokens_BW, 0.3, 0.0, cu_seqlens).main
    assert not torch.equal(plain, apart)


def test_load_imbalance_is_the_busiest_over_the_mean():
    assert load_imbalance(torch.tensor([4, 4, 4, 4])) == 1
    assert load_imbalance(torch.tensor([16, 0, 0, 0])) == 4
