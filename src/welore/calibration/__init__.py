"""Text -> statistics of the inputs and output gradients of every targeted matrix, and the norms made of them.

Import `collect` for the verb, `statistics` for its result, `scaling` for the norms; the rest is private.
"""
