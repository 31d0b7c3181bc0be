"""Recipes: versioned YAML that says how every site, the inverse and the projections are quantized.

Reading goes file or shipped name -> overrides (`--set a.b=c`) -> `Recipe` -> `Recipe.layer(i)`, a `LayerScheme`.
"""

from .reading import apply_override, differences, flat, load_recipe, parse_recipe, shipped_recipes
from .recipe import Recipe
from .sections import ROLES, LayerConfig, SiteConfig

__all__ = [
    "ROLES",
    "LayerConfig",
    "Recipe",
    "SiteConfig",
    "apply_override",
    "differences",
    "flat",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
]
