"""The low-rank layers, and one object for every form in which they store a matrix.

Import `FORMS` and what plans need from storage_forms (without torch), the nn.Modules from low_rank, grids of blocks
from block_grid, and the experts of mixtures from experts; expert_names tells their names (without torch).
"""
