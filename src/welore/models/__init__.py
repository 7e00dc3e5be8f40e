"""The structure of a decoder: its targeted matrices and MLPs, where tensors come from and go to, the loader.

Import `open_source` from source, `open_sink` from sink, `find_targets` from targets, `load` from load, `WeLoreConfig`
from quantizer.
"""
