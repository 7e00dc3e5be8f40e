"""Statistics: what the inputs and the output gradients of every targeted matrix are like, over a text.

`artefact` holds what was gathered, `collection` is the verb; docs/method.md has the decisions.
"""
