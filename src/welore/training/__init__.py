"""Training: fine-tuning of compressed and dense models by several methods, with or without a teacher.

Import the verb `finetune`, `methods.mark_trainable`, and from `run_dir` the names of the files of a run.
"""
