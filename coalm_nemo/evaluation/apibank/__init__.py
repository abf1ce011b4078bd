"""API-Bank (Li et al., 2023), levels 1 and 2."""
