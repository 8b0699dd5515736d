"""Face recognition from photographs to a recogniser: ``python -m recipes.face COMMAND`` (README.md)."""
