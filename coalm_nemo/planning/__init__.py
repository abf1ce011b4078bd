"""Which layout fits, how fast it runs, and why: FLOPs, memory, pipeline bubble, communication, search. No torch."""
