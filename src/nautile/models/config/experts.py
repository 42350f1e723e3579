"""Fields of a mixture of experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nautile.core.errors import UserError
from nautile.models.config.base import DecoderConfig, Rule


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

    @classmethod
    def read_fields(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """As of every family; transformers 5 may list the kind of every layer instead of counting the dense ones."""
        values = super().read_fields(published)
        if values.get("topk_method") == "gready":  # as the class default of V2's published code spells it
            values["topk_method"] = "greedy"
        kinds = published.get("mlp_layer_types")
        if kinds:
            dense = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
            if kinds[dense:] != ["sparse"] * (len(kinds) - dense):
                raise UserError(
                    f"config.json: mlp_layer_types {kinds} is not supported",
                    "dense layers lie at the bottom here, and all others have experts",
                    "check that config.json belongs to the weights",
                )
            values["first_k_dense_replace"] = dense
        return values

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
