"""Choose the rank of every matrix of a model: spectra and a target -> a plan.

Import allocate from solver, Spectra from spectra, Plan and Allocation from plan, and the table STRATEGIES.
"""
