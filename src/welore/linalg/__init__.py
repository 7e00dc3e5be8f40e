"""Tensors in, tensors out: singular values, factors, interpolative decompositions, spectra, Optimal Brain Surgeon.

Import `singular_values`, `factorise` and `Metric` from svd, `pivoted` from interpolative, `normalise` and
`gaussian_null` from spectrum, `removal` and `refit` from brain_surgeon; `_lapack` is private.
"""
