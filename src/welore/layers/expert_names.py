"""Names of the matrices of single experts, LAYER.experts.NUMBER.gate_proj: read by models, statistics and reports."""

import re

EXPERT = re.compile(r"\.experts\.\d+\.")


def is_of_expert(name: str) -> bool:
    """Whether a layer, or a block of one, is that of a single expert."""
    return EXPERT.search(name) is not None


def of_all_experts(name: str) -> str:
    """The name without the number of the expert, which is one for all experts of a layer."""
    return EXPERT.sub(".experts.", name)
