"""Sources of training rows, one public layout a file."""
