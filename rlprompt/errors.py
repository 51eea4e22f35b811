"""The one error that is the user's to mend.

Everything a user can get wrong (a recipe, a model path, a reward, a dataset, an artifact) raises
`InputError` with one sentence: what was wrong, where, and what to do. The command line prints that
sentence and nothing else. Any other exception is a defect of rlprompt or of the machine.
"""

from __future__ import annotations


class InputError(ValueError):
    """A wrong input, described in one sentence that ends with what to do about it."""
