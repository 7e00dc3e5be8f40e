"""How figures, tables and results write numbers and names."""

from pathlib import PurePath


def percent(fraction: float) -> str:
    """A fraction 0..1 in per cent."""
    return f"{100 * fraction:.1f} %"


def megabytes(size: float) -> str:
    """Bytes in MB = 1e6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def perplexity_text(value: float | None) -> str:
    """Four significant figures; a power of ten from a million upwards."""
    if value is None:
        return "not finite"
    if value >= 1e6:
        return f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def last_name(path: str) -> str:
    """The last part of a path or a hub id."""
    return PurePath(path.replace("\\", "/")).name or path
