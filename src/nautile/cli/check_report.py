"""The text of ``nautile check``."""

from typing import Any

from nautile.core.sizes import size_text

LISTS = {"missing": "missing", "unexpected": "unexpected", "wrong_shape": "wrong shape", "wrong_dtype": "wrong dtype"}
SAMPLED = ("do_sample", "temperature", "top_p", "top_k")
"""Fields of generation_config.json that are worth a line."""


def print_report(report: dict[str, Any], most: int | None = 20) -> None:
    """Print what the folder holds, what is not read, notes, and the lists of what is wrong, `most` lines each."""
    print(report["folder"])
    for label, text in _facts(report).items():
        print(f"  {label:<12} {text}")
    for reason, names in report["not_read"].items():
        print(f"  {'not read':<12} {len(names):,} × {reason}: {_few(names)}")
    for note in report["notes"]:
        print(f"  {'note':<12} {note}")
    if report["whole"]:
        print("whole: every tensor of the model is there, in its shape, and nothing else")
        return
    counts = [f"{len(report[key])} {title}" for key, title in LISTS.items() if report[key]]
    print(f"not whole: {', '.join([*counts, *report['problems']])}")
    for key, title in LISTS.items():
        _print_list(title, report[key], most)


def _facts(report: dict[str, Any]) -> dict[str, str]:
    parameters, weights = report["parameters"], report["weights"]
    mtp = f", and {parameters['mtp_modules']:,} in MTP modules" if parameters["mtp_modules"] else ""
    weights_in = "1 file" if weights["files"] == 1 else f"{weights['files']:,} files"
    kinds = ", ".join(
        f"{count['tensors']:,} {dtype} ({size_text(count['bytes'])})" for dtype, count in weights["dtypes"].items()
    )
    facts = {
        "family": f"{report['family']}, {report['layers']} layers of width {report['hidden_size']:,}",
        "parameters": f"{parameters['main_model']:,}, {parameters['active_per_token']:,} active per token{mtp}",
        "weights": f"{weights['tensors']:,} tensors in {weights_in}: {kinds}",
    }
    quantized = report["quantization"]
    if quantized and report["quantised_weights"]:
        rows, columns = quantized["weight_block_size"]
        scales = f", {quantized['scale_fmt']} scales" if "scale_fmt" in quantized else ""
        facts["quantised"] = f"{report['quantised_weights']:,} weights in FP8 blocks of {rows} × {columns}{scales}"
    chosen = report["generation_config"]
    if chosen is None:
        facts["generation"] = "no generation_config.json: defaults are nautile's"
    else:
        told = ", ".join(f"{key} {chosen[key]}" for key in SAMPLED if chosen.get(key) is not None)
        facts["generation"] = f"{told or 'no sampling defaults'} (generation_config.json)"
    return facts


def _print_list(title: str, lines: list[str], most: int | None) -> None:
    if not lines:
        return
    shown = lines[:most]
    print(f"  {title}:")
    for line in shown:
        print(f"    {line}")
    if len(shown) < len(lines):
        print(f"    … and {len(lines) - len(shown):,} more (--lines 0 names all)")


def _few(names: list[str]) -> str:
    return f"{names[0]}, …" if len(names) > 1 else names[0]
