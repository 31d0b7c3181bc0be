"""Recipes that ship: YAML read by `qdeltanet.recipe`."""
