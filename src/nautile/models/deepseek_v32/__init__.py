"""DeepSeek-V3.2-Exp and V3.2: V3 with sparse attention."""
