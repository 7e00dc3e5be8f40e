"""The study of the paper: pre-train a small Llama and record how its weights become low rank (the verb `pretrain`).

Nothing in the package imports this room; scripts may import `pretrain.pretrain`, `trace.Trace` and the tables and
figures of `claims` and `figures`.
"""
