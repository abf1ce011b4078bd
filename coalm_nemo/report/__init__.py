"""One page of what runs and evaluations left on disk."""
