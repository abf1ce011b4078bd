"""What MultiWOZ and SGD have in common: a ReAct agent over several turns, and the state that it shows to have understood."""
