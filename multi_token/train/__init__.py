"""Training: the closed-form start, then stages on a subclass of transformers' Trainer."""
