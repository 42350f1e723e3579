"""The field of multi-token prediction."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nautile.models.config.base import DecoderConfig, Rule


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
