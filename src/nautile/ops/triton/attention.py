"""Causal attention in Triton: keys after a query and other documents are skipped by blocks, and no score leaves the
chip. Heads of keys and of values may differ in width (192 and 128 in MLA), and query heads may share key heads.
"""

from torch import Tensor

from nautile.ops.triton.flash import Masks, attend
from nautile.ops.triton.support import floats as why_not

__all__ = ["causal_attention", "why_not"]


def causal_attention(
    q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """See `nautile.ops.causal_attention`."""
    masks = Masks() if document_ids_BS is None else Masks.of_documents(document_ids_BS)
    return attend(q_BSHQ, k_BSGQ, v_BSGV, scale, masks)
