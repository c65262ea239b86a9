"""Evaluation of a trained run on rows whose answers are known."""
