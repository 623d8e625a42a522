"""Sentences that many docstrings need, once; all of them are held to these.

Editors read a docstring from the source, so that each function and transform
has all of its arguments written out.
"""

# By argument: the forms there are of its sentence.
SENTENCES = {}
