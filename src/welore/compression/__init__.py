"""Make a smaller model: statistics, spectra, plan, factors, recovery, checkpoint.

Import the verbs and their results: analyze, compress, merge, export, info, estimate.
"""
