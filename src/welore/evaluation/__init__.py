"""Evaluation: perplexity, divergence from the dense model, accuracy on tasks, tasks of lm-eval.

Import `evaluate`, `evaluate_tasks` and `score`; tasks are in `welore.evaluation.tasks`, which needs no torch.
"""
