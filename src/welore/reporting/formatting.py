"""How numbers are written, in figures, tables and results."""


def percent(fraction: float) -> str:
    """A fraction 0..1 as per cent."""
    return f"{100 * fraction:.1f} %"


def megabytes(size: float) -> str:
    """Bytes as MB = 1e6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def perplexity_text(value: float | None) -> str:
    """Four figures where they mean something, a power of ten where only the order does."""
    if value is None:
        return "not finite"
    if value >= 1e6:
        return f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
