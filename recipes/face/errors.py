"""What a command says in one line, and ends: everything that a user can mend."""

from __future__ import annotations


class RecipeError(ValueError):
    """The message names the file or the option."""
