"""Scores of a model on MultiWOZ, SGD, API-Bank, BFCL and language-model tasks."""
