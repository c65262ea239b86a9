"""Evaluation of a trained run on rows with known answers.

Rows and a model in, numbers and reports out; `cli/evaluate.py` prints them and
`train/evaluation.py` calls them during a run.
"""
