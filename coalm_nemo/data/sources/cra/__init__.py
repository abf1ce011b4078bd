"""CRA ("conversational ReAct API") rows built from annotated task-oriented dialogues, with the real service results.

The published CRA set had a language model write the thoughts and invent the API results (arXiv 2502.08820, section 3).
Schema-Guided Dialogue carries real calls and results, so here both come from the annotation, and every row is checked.

    dialogue.py  the files' layout -> dataclasses         scene.py       what is known at a turn
    schema.py    services, functions, tool list           user_words.py  what the user does, in words
    literal.py   a call as text and back                  thoughts.py    the two thoughts of a turn
    observe.py   service results -> observation           wording.py     words for intents and slots
    turns.py     a dialogue -> the parts of its turns     prompts.py     parts of turns -> the text of rows
    derived.py   calls for MultiWOZ, which has none       checks.py      a row's text -> why it must go, if it must
    source.py    files, blocks and options of both        rows.py        turns -> checked rows

`writer*.py` have a language model reword thoughts and responses: its cache, its client, and the checks on what it says.
"""
