"""Model families: one folder each, wired from `nautile.layers`. `io` knows them by this table."""

FAMILIES: dict[str, str] = {
    "deepseek_v3": "nautile.models.deepseek_v3",
}
"""`model_type` of a config.json → package with `config`, `model` and `checkpoint`."""
