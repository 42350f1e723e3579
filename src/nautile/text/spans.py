"""A text in consecutive parts of bounded length."""


def spans(text: str, longest: int) -> list[str]:
    """Cut `text` into parts of at most `longest` characters, after a line end where there is one; none is empty."""
    parts, start = [], 0
    while start < len(text):
        end = start + longest
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        parts.append(text[start:end])
        start = end
    return parts
