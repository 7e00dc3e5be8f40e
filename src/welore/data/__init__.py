"""The one door to text: data sets of any kind -> documents, packed blocks and windows of tokens.

Import `text` for documents, `packing` and `windows` for tokens, `mixture` for weights, `self_generated` for own text.
"""
