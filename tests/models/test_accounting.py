"""The analytic counts against published figures and against the modules themselves."""

import dataclasses
import json

import pytest

from nautile.core.errors import UserError
from nautile.models.accounting.cache import cache_cost, grouped_cache_cost
from nautile.models.accounting.flops import decode_flops, prefill_flops, train_flops
from nautile.models.accounting.memory import inference_memory, training_memory
from nautile.models.accounting.parameters import fp8_scales, mtp_parameters, parameters, published_fp8_numbers, total
from nautile.models.accounting.shape import shape_from_config
from nautile.models.deepseek_v3.config import PRESETS, V3_671B, V3_NANO
from nautile.models.presets import PRESETS as ALL_PRESETS

V3 = shape_from_config(V3_671B.to_hf(), "v3")
PUBLISHED = {name: shape_from_config(config.to_hf(), name) for name, config in ALL_PRESETS.items()}
DEEPSEEK_67B = PUBLISHED["deepseek-llm-67b"]
V32 = shape_from_config(
    V3_671B.to_hf() | {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
)
LLAMA_405B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
}


def test_v3_main_model_has_the_published_size():
    whole = total(parameters(V3))
    assert whole.total == 671_026_419_200
    assert round(whole.active / 1e9) == 37
    assert round(mtp_parameters(V3).total / 1e9, 1) == 11.6  # "11.5B unique parameters" in the V3 repository


def test_v3_and_v32_checkpoints_as_stored():
    assert published_fp8_numbers(V3) == 684_531_386_000
    assert published_fp8_numbers(V32) == 685_396_921_376
    assert fp8_scales(V3) == 41_540_496


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("v2-236b", 236, 21), ("v2-lite", 16, 2), ("moe-16b", 16, 3), ("deepseek-llm-67b", 67, 67)],
)
def test_published_sizes(name, billions, active):
    whole = total(parameters(PUBLISHED[name]))
    assert (round(whole.total / 1e9), round(whole.active / 1e9)) == (billions, active)


def test_v2_lite_is_exact():
    assert total(parameters(PUBLISHED["v2-lite"])).total == 15_706_484_224


def test_dense_models_of_other_makers():
    llama = total(parameters(shape_from_config(LLAMA_405B)))
    assert llama.total == 405_853_388_800
    qwen = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
    qwen |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    assert total(parameters(shape_from_config(qwen))).total == 494_032_768  # Qwen2-0.5B: tied, biases on q, k and v


def test_training_flops_are_those_of_the_hardware_paper():
    assert round(train_flops(V3, 4096).all / 1e9) == 250
    assert round(train_flops(PUBLISHED["v2-236b"], 4096).all / 1e9) == 155


def test_sparse_attention_flops_stop_growing_but_the_indexer_does_not():
    growth = prefill_flops(V32, 131072).attention - prefill_flops(V32, 65536).attention
    of_the_indexer = 61 * 2 * 64 * 128 * 65536 / 2
    assert growth == pytest.approx(of_the_indexer, rel=0.02)
    assert prefill_flops(V3, 131072).attention == pytest.approx(2 * prefill_flops(V3, 65536).attention, rel=1e-4)
    assert prefill_flops(V32, 1024).attention > prefill_flops(V3, 1024).attention  # nothing to skip, and an indexer


def test_decode_reads_latents_in_the_absorbed_form():
    per_head_and_layer = decode_flops(V3, 1000).attention / (61 * 128)
    assert per_head_and_layer == 2 * 1000 * (512 + 64 + 512)


def test_kv_bytes_are_those_of_the_hardware_paper():
    assert cache_cost(V3).bytes() == 70_272
    assert cache_cost(shape_from_config(LLAMA_405B)).bytes() == 516_096


def test_v2_saves_93_percent_of_the_cache_of_67b_only_with_six_bit_elements():
    v2, dense = cache_cost(PUBLISHED["v2-236b"]), cache_cost(DEEPSEEK_67B)
    assert (v2.elements, dense.elements) == (34_560, 194_560)
    assert round(100 * (1 - v2.bytes() / dense.bytes()), 1) == 82.2
    assert round(100 * (1 - v2.bytes(bits=6) / dense.bytes()), 1) == 93.3


def test_mla_costs_two_and_a_quarter_groups():
    v2 = PUBLISHED["v2-236b"]
    assert cache_cost(v2).elements / grouped_cache_cost(v2, 1).elements == 2.25
    assert grouped_cache_cost(v2).elements == 2 * 128 * 128 * 60


def stored_in_the_module(config) -> int:
    """Parameters and correction biases of the model itself, built on the meta device."""
    torch = pytest.importorskip("torch")
    from nautile.models.family import build_model

    with torch.device("meta"):
        model = build_model(config)
    biases = sum(r.e_score_correction_bias.numel() for r in model.routers() if r.e_score_correction_bias is not None)
    return sum(p.numel() for p in model.parameters()) + biases


def counted(published) -> int:
    shape = shape_from_config(published)
    return total(parameters(shape)).total + mtp_parameters(shape).total


TINY = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
}

EXPERTS = {
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
}
LATENT = {"kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 28}


@pytest.mark.parametrize(
    "published",
    [
        *[{"model_type": "deepseek_v3"} | change for change in (
            {"q_lora_rank": None},
            {"tie_word_embeddings": True},
            {"topk_method": "greedy", "scoring_func": "softmax"},
            {"num_nextn_predict_layers": 2},
            {"n_shared_experts": 3},
            {"first_k_dense_replace": 0},
            {"first_k_dense_replace": 1, "moe_layer_freq": 2, "num_hidden_layers": 6},
            {"first_k_dense_replace": 1, "moe_layer_freq": 2, "num_nextn_predict_layers": 2},
        )],
        {"model_type": "llama", **TINY},
        {"model_type": "llama", **TINY, "num_key_value_heads": 2, "attention_bias": True},
        {"model_type": "llama", **TINY, "head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"model_type": "qwen2", **TINY, "num_key_value_heads": 3, "tie_word_embeddings": True},
        {"model_type": "qwen2", **TINY, "num_key_value_heads": 2},
        {"model_type": "deepseek", **TINY, **EXPERTS},
        {"model_type": "deepseek", **TINY, **EXPERTS, "attention_bias": True, "n_shared_experts": 0},
        {"model_type": "deepseek_v2", **TINY, **EXPERTS, **LATENT},
        {"model_type": "deepseek_v32", **TINY, **EXPERTS, **LATENT, "q_lora_rank": 36, "n_group": 2, "topk_group": 1}
        | {"index_n_heads": 16, "index_head_dim": 24, "index_topk": 5, "num_nextn_predict_layers": 1},
        {"model_type": "deepseek_v2", **TINY, **EXPERTS, **LATENT, "q_lora_rank": 36, "topk_method": "noaux_tc"},
    ],
)  # fmt: skip
def test_counts_equal_the_module_of_unusual_configs(published):
    from nautile.models.family import config_from_hf

    if published["model_type"] == "deepseek_v3":
        published = V3_NANO.to_hf() | published
    assert counted(published) == stored_in_the_module(config_from_hf(published))


@pytest.mark.parametrize("name", ["v2-lite", "v3-671b", "v32-685b", "v3-nano", "coder-33b", "r1-distill-qwen-7b"])
def test_both_spellings_of_a_config_are_counted_alike(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    published = ALL_PRESETS[name].to_hf()
    transformers.AutoConfig.for_model(**published).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    shape, again = shape_from_config(published, name), shape_from_config(rewritten, name)
    assert dataclasses.replace(again, mtp_modules=shape.mtp_modules) == shape


def test_layers_listed_by_kind_go_before_a_count_of_dense_ones():
    listed = V3_NANO.to_hf() | {"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 3}
    assert counted(listed) == counted(V3_NANO.to_hf() | {"first_k_dense_replace": 2})
    assert shape_from_config(listed | {"mlp_layer_types": ["dense"] * 3}).moe_layers == 0


def test_unknown_and_incomplete_configs_are_refused():
    with pytest.raises(UserError, match="model_type 'mamba'"):
        shape_from_config({"model_type": "mamba"})
    with pytest.raises(UserError, match="did you mean 'deepseek_v3'"):
        shape_from_config({"model_type": "deepseek_v33"})
    with pytest.raises(UserError, match="kv_lora_rank"):
        shape_from_config({"model_type": "deepseek_v3", "vocab_size": 8})
    with pytest.raises(UserError, match="attention_bias"):
        shape_from_config(V3_671B.to_hf() | {"attention_bias": True})


def kept_for_backward(config, batch_size, sequence_length, bf16):
    """Bytes of the distinct tensors that autograd keeps in a forward pass, less weights and their casts.

    Those are told by their size, so no activation may have a weight's: use odd lengths.
    """
    torch = pytest.importorskip("torch")
    from nautile.core.context import ForwardContext
    from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(config)
    model.init_weights()
    weights = {p.numel() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps the address from being used again
        return tensor

    tokens = torch.randint(config.vocab_size, (batch_size, sequence_length + 1))
    ctx = ForwardContext.for_tokens(tokens[:, :-1])
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.hidden(ctx).hidden_BSD
        ahead = model.predict_ahead(hidden, tokens, ctx)
    assert len(ahead) == config.num_nextn_predict_layers
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("sequence_length", "mtp"), [(61, 0), (251, 0), (127, 1)])
def test_activations_are_about_what_autograd_keeps(sequence_length, mtp, bf16):
    config = dataclasses.replace(PRESETS["v3-micro"], num_nextn_predict_layers=mtp)
    planned = training_memory(shape_from_config(config.to_hf()), 5, sequence_length, bf16=bf16)
    assert planned.activations == pytest.approx(kept_for_backward(config, 5, sequence_length, bf16), rel=0.15)


def test_training_state_is_sixteen_bytes_a_parameter_and_zero1_divides_half_of_it():
    one, eight = training_memory(V3, 1, 4096), training_memory(V3, 1, 4096, moment_shards=8)
    count = total(parameters(V3)).total + mtp_parameters(V3).total
    assert one.weights + one.gradients + one.moments == 16 * count
    assert (eight.weights, eight.gradients, eight.activations) == (one.weights, one.gradients, one.activations)
    assert eight.moments == count


def test_inference_memory_of_v3():
    memory = inference_memory(V3, batch_size=2, context=1000)
    assert (memory.weights, memory.cache) == (2 * 671_026_419_200, 2 * 1000 * 70_272)
