"""The study: low-rank weights emerging from low-rank gradients, watched while a small Llama is pre-trained.

Paper: WeLore, section 3 and appendix; docs/study/README.md has the verdicts.
"""
