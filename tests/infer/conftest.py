"""A tiny random V3 model and a byte-level tokenizer of the same vocabulary."""

from dataclasses import replace

import pytest
import torch

from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.text.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "für jede Übung: 你好, 世界 🐚\n", "the quick brown fox\n"] * 4


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


def random_model(seed: int = 0, **change) -> DeepseekV3ForCausalLM:
    # Wide weights make decisive logits: no greedy choice hangs on the last bit of a sum.
    config = replace(V3_NANO, vocab_size=300, max_position_embeddings=64, initializer_range=0.15, **change)
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture(scope="session")
def make_model():
    """The model for other seeds and config fields."""
    return random_model


@pytest.fixture(scope="session")
def model() -> DeepseekV3ForCausalLM:
    return random_model()


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    """The model as a run folder leaves it."""
    from nautile.models.io import save_model

    run = tmp_path_factory.mktemp("run")
    save_model(model, run / "model")
    tokenizer.save(run / "model")
    return run
