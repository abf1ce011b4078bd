"""BFCL through its own package, which lives in an environment of its own and does the prompting, executing and scoring."""
