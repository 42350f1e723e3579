"""What the configurations of several families share: fields with their Hugging Face names, rules, both spellings.

A family's configuration is `DecoderConfig` with the mixins for its attention and its feed-forward. Nothing here imports
torch, so that ``--help`` and `check` answer at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import NoneType
from typing import Any, ClassVar, Literal, Self, get_args, get_type_hints

from nautile.core.errors import UserError
from nautile.layers.rope_scaling import RopeScaling, read_rope

Rule = tuple[bool, str, str]
"""Whether it holds, what is wrong where it does not, and why that is impossible."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary positions."""

    MODEL_TYPE: ClassVar[str]
    """`model_type` of its config.json."""
    ARCHITECTURE: ClassVar[str]
    """Class name in its config.json."""
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (  # each mixin names its own
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    FIXED: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0.0}
    """Fields of a file that have one value here: written on saving, any other is refused. Mixins add theirs."""
    FILE_DEFAULTS: ClassVar[Mapping[str, Any]] = {"initializer_range": 0.02}
    """What a config.json means that leaves a field out, where that differs from the defaults below."""

    vocab_size: int
    """Rows of the embedding and of the output head."""
    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width of the SwiGLU in dense layers."""
    num_hidden_layers: int
    """Decoder layers, without MTP modules."""
    num_attention_heads: int
    """Query heads H."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Context extension; null for plain RoPE."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMSNorms."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    bos_token_id: int | None = None
    """Id that begins a document; null where the family has none."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Id or ids that end a document or an answer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a document or an answer."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def check(self) -> None:
        """Raise `UserError` if a field is impossible or two contradict each other."""
        for name in (name for part in _own(type(self), "AT_LEAST_ONE") for name in part):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model: {name} {getattr(self, name)} is not possible", "a model needs one", "give 1 or more"
                )
        for holds, what, why in self.rules():
            if not holds:
                raise UserError(
                    f"model: {what} is not possible", why, "correct the value in config.json or in the recipe"
                )

    def rules(self) -> Iterator[Rule]:
        """What must hold between the fields; mixins add theirs."""
        yield self.rope_theta > 1, f"rope_theta {self.rope_theta}", "frequencies fall with powers of it"
        yield self.rms_norm_eps >= 0, f"rms_norm_eps {self.rms_norm_eps}", "a root is taken of what it is added to"

    @classmethod
    def from_hf(cls, published: Mapping[str, Any]) -> Self:
        """Read a config.json in the published spelling or in transformers 5's (`rope_parameters`).

        Raises:
            UserError: A field is missing, impossible, or asks for something this family does not do.
        """
        _refuse_what_is_not_built(cls, published)
        defaults = {key: value for part in _own(cls, "FILE_DEFAULTS") for key, value in part.items()}
        values = {**defaults, **cls.read_fields(published)}
        missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]
        if missing:
            raise UserError(
                f"config.json: {missing[0]} is missing",
                f"a {cls.MODEL_TYPE} model cannot be built without it",
                "copy the model's complete config.json",
            )
        config = cls(**values)
        config.check()
        return config

    @classmethod
    def read_fields(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields as the file gives them; absent ones, and null where null has no meaning, keep their defaults."""
        hints = get_type_hints(cls)
        names = {f.name for f in fields(cls)} - {"rope_theta", "rope_scaling"}
        values = {
            key: value
            for key, value in published.items()
            if key in names and (value is not None or NoneType in get_args(hints[key]))
        }
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        values["rope_theta"], values["rope_scaling"] = read_rope(published)
        return values

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, in the published spelling."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.MODEL_TYPE,
            **values,
            **_fixed(type(self)),
            "use_cache": True,
        }


def _own(cls: type, name: str) -> list[Any]:
    """The class variable `name` of a configuration and of all its bases, bases first."""
    return [vars(base)[name] for base in reversed(cls.__mro__) if name in vars(base)]


def _fixed(cls: type[DecoderConfig]) -> dict[str, Any]:
    return {key: value for part in _own(cls, "FIXED") for key, value in part.items()}


def _refuse_what_is_not_built(cls: type[DecoderConfig], published: Mapping[str, Any]) -> None:
    for name, only in _fixed(cls).items():
        value = published.get(name)
        if value is not None and value != only:
            raise UserError(
                f"config.json: {name} {value!r} is not supported",
                f"{cls.MODEL_TYPE} models here have {only!r}; the weights would be used for another computation",
                f"check that config.json belongs to the weights, or set {name} to {only!r}",
            )


@dataclass(frozen=True, kw_only=True)
class GroupedHeads(DecoderConfig):
    """Attention whose query heads share keys and values in groups; one head per group is plain multi-head attention."""

    num_key_value_heads: int | None = None
    """Heads of keys and values; null for one per query head."""
    head_dim: int | None = None
    """Dimensions of a head; null for hidden_size / num_attention_heads."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        heads, groups = self.num_attention_heads, self.kv_heads
        yield (
            groups > 0 and heads % groups == 0,
            f"num_key_value_heads {groups} with num_attention_heads {heads}",
            "every key head serves as many query heads",
        )
        yield self.head_width % 2 == 0, f"a head of {self.head_width} dimensions", "RoPE turns pairs of dimensions"
        yield (
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"hidden_size {self.hidden_size} with num_attention_heads {heads}",
            "heads divide the hidden state evenly unless head_dim says otherwise",
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, without null where readers take it amiss."""
        published = {**super().to_hf(), "num_key_value_heads": self.kv_heads}
        if self.head_dim is None:
            del published["head_dim"]
        return published


@dataclass(frozen=True, kw_only=True)
class RoutedExperts(DecoderConfig):
    """DeepSeekMoE (arXiv 2401.06066): fine-grained routed experts beside shared ones."""

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        "moe_intermediate_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "moe_layer_freq",
    )

    moe_intermediate_size: int
    """Width F of one expert's SwiGLU."""
    first_k_dense_replace: int = 0
    """Layers at the bottom that keep a dense SwiGLU instead of experts."""
    moe_layer_freq: int = 1
    """Above those, every layer whose index this divides has experts."""
    n_routed_experts: int
    """Experts E that the router chooses from."""
    n_shared_experts: int = 0
    """Experts that every token visits, stored as one SwiGLU of n_shared_experts × moe_intermediate_size."""
    num_experts_per_tok: int
    """Routed experts K per token."""
    n_group: int = 1
    """Groups that the routed experts are divided into for node-limited routing."""
    topk_group: int = 1
    """Groups a token may choose its experts from."""
    scoring_func: Literal["sigmoid", "softmax"] = "softmax"
    """Affinity of a token to an expert: sigmoid (V3) or softmax (before)."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "greedy"
    """Selection: noaux_tc adds the correction bias (V3), the others take the plain scores."""
    norm_topk_prob: bool = False
    """Divide the chosen experts' weights by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights."""
    aux_loss_alpha: float = 0.001
    """Weight of the balance loss that the model was trained with."""
    seq_aux: bool = True
    """The balance loss looks at each sequence (true) or at the whole batch (false)."""

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this index, MTP modules counted on, is a mixture of experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        experts, groups, kept, k = self.n_routed_experts, self.n_group, self.topk_group, self.num_experts_per_tok
        yield experts % groups == 0, f"n_routed_experts {experts} with n_group {groups}", "groups must be of equal size"
        yield (
            kept <= groups,
            f"topk_group {kept} with n_group {groups}",
            "a token cannot use more groups than there are",
        )
        yield (
            self.topk_method != "noaux_tc" or groups == 1 or experts // groups >= 2,
            f"n_group {groups} with n_routed_experts {experts}",
            "noaux_tc scores a group by its two best experts, so a group needs two",
        )
        reachable = experts if self.topk_method == "greedy" else kept * (experts // groups)
        yield k <= reachable, f"num_experts_per_tok {k}", "the chosen groups hold fewer experts than a token needs"
        yield (
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace {self.first_k_dense_replace} with num_hidden_layers {self.num_hidden_layers}",
            "there are fewer layers than dense layers",
        )
        yield self.n_shared_experts >= 0, f"n_shared_experts {self.n_shared_experts}", "0 is a layer without one"
        yield self.aux_loss_alpha >= 0, f"aux_loss_alpha {self.aux_loss_alpha}", "it is the weight of a loss; 0 is none"


@dataclass(frozen=True, kw_only=True)
class LatentHeads(DecoderConfig):
    """Multi-head latent attention (V2 paper, arXiv 2405.04434 §2.1)."""

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )
    FIXED: ClassVar[Mapping[str, Any]] = {"attention_bias": False}

    q_lora_rank: int | None = None
    """Width of the query latent; null for one full query projection."""
    kv_lora_rank: int
    """Width C of the key-value latent, which is what the cache holds."""
    qk_nope_head_dim: int
    """Dimensions N of a head that carry no position."""
    qk_rope_head_dim: int
    """Dimensions R of a head that are rotated; the rotated key is shared by all heads."""
    v_head_dim: int
    """Value dimensions V of a head."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        yield (
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim {self.qk_rope_head_dim}",
            "RoPE turns pairs of dimensions",
        )
        yield (
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank {self.q_lora_rank}",
            "null stands for none",
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model; published files repeat the number of heads."""
        return {**super().to_hf(), "num_key_value_heads": self.num_attention_heads}


@dataclass(frozen=True, kw_only=True)
class MultiTokenPrediction(DecoderConfig):
    """Extra modules that each predict one token further (V3 paper, arXiv 2412.19437 §2.2)."""

    FILE_DEFAULTS: ClassVar[Mapping[str, Any]] = {"num_nextn_predict_layers": 0}

    num_nextn_predict_layers: int = 1
    """Depth of multi-token prediction: extra modules, each predicting one token further."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        yield (
            self.num_nextn_predict_layers >= 0,
            f"num_nextn_predict_layers {self.num_nextn_predict_layers}",
            "it counts the MTP modules; 0 is a model without one",
        )
