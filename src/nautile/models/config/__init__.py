"""What the configurations of several families share: fields with their Hugging Face names, rules, both spellings.

A family's configuration is `DecoderConfig` with the mixins for its attention and its feed-forward. Nothing here imports
torch, so that ``--help`` and `check` answer at once.
"""

from nautile.models.config.base import DecoderConfig, Rule
from nautile.models.config.experts import RoutedExperts
from nautile.models.config.heads import GroupedHeads, LatentHeads
from nautile.models.config.prediction import MultiTokenPrediction

__all__ = ["DecoderConfig", "GroupedHeads", "LatentHeads", "MultiTokenPrediction", "RoutedExperts", "Rule"]
