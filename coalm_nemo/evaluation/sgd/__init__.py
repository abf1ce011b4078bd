"""Schema-Guided Dialogue: an agent over the services of its schema, whose results are the dialogues' own."""
