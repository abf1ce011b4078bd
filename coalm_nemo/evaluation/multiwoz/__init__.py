"""MultiWOZ: an agent over its databases, and how its states and responses are scored."""
