"""DeepSeekMoE: router, load balance, experts and the dispatch seam."""
