"""Evaluation of a model: loss, exact match, multiple choice, lm-evaluation-harness.

scoring        log-probabilities and loss
generation     exact match of generated answers
choices        multiple choice by likelihood
side_by_side   the base model and the tuned one
harness        tasks of lm-evaluation-harness
"""
