"""Training: configuration, the trainer, and one whole run."""
