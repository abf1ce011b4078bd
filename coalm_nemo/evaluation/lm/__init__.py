"""What fine-tuning made the model forget: lm-evaluation-harness on public tasks or on a user's own, offline."""
