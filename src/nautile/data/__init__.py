"""From raw text to batches: sources, held-out split, packed token shards, a loader that resumes exactly, baselines."""
