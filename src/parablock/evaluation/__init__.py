"""Evaluation of a model: loss, exact match, ROUGE-L, multiple choice, instructions, lm-evaluation-harness.

scoring        log-probabilities and loss
generation     generated answers, their exact match and ROUGE-L
answers        answers to a few test prompts, for the report
conversation   prompts that people write, for `chat` and `generate`
choices        multiple choice by likelihood
instructions   instructions that rules check
side_by_side   the base model and the tuned one
harness        tasks of lm-evaluation-harness
"""
