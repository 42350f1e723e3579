"""Numbers of bytes as people read them."""


def size_text(count: int) -> str:
    """``count`` bytes with one decimal in the largest fitting of GB, MB and KB (powers of 1000): ``689.0 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
