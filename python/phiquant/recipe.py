"""A recipe says which module gets which grid: ordered patterns over module names, and a default."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PhiquantError
from .models import phi
from .spec import QuantSpec, Target, target
from .spec import spec as read_spec

FLOAT = "float"
Choice = QuantSpec | None  # None: stays in float


@dataclass(frozen=True)
class Recipe:
    """Patterns in order; the first that matches a module's name decides, `default` if none does.

    rules: (pattern, spec) pairs or a mapping. A pattern is a shell pattern over the whole name
        ("*.mlp.down_proj", "model.layers.0.*") or, after "re:", a regular expression that must match it all.
        A spec is a QuantSpec, a spec's text, a target or its name, or "float".
    default: the spec of the modules no rule names. The output head and the embedding stay in float
        unless a rule names them (models/phi.py says why).
    """

    rules: tuple[tuple[str, Choice], ...] = ()
    default: Choice = None

    def __init__(
        self,
        rules: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        default: QuantSpec | Target | str | None = None,
    ) -> None:
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        object.__setattr__(self, "rules", tuple((_checked(pattern), _choice(value)) for pattern, value in pairs))
        object.__setattr__(self, "default", _choice(default))

    def spec_for(self, module: str) -> Choice:
        """The spec of the module of that name; None: it stays in float. What names a fused linear names its slices."""
        names = dict.fromkeys((module, phi.fused_name(module)))
        for pattern, choice in self.rules:
            if any(_matches(pattern, name) for name in names):
                return choice
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in phi.FLOAT_BY_DEFAULT):
            return None
        return self.default

    def resolve(self, modules: Iterable[str]) -> dict[str, Choice]:
        """The spec of every module, in order. PhiquantError for a pattern that matches none of them.

        A fused linear whose projections (phi.SLICES) get different specs is there as these, by their names.
        """
        names = list(modules)
        for pattern, _ in self.rules:
            if not any(_matches(pattern, part) for name in names for part in (name, *phi.slice_names(name))):
                some = ", ".join(names[:4])
                raise PhiquantError(
                    f"the recipe's pattern {pattern!r} matches none of the {len(names)} modules that can be "
                    f"quantized ({some}, ...); names are matched whole, so begin it with '*' or 'model.'"
                )
        specs: dict[str, Choice] = {}
        for name in names:
            slices = {part: self.spec_for(part) for part in phi.slice_names(name)} or {name: self.spec_for(name)}
            specs |= slices if len(set(slices.values())) > 1 else {name: next(iter(slices.values()))}
        return specs

    def to_json(self) -> str:
        """JSON text: {"rules": {pattern: spec}, "default": spec}; the order of the rules counts."""
        rules = {pattern: _text(choice) for pattern, choice in self.rules}
        if len(rules) < len(self.rules):
            raise PhiquantError("a recipe with the same pattern twice has no JSON form; drop the later rule")
        return json.dumps({"rules": rules, "default": _text(self.default)}, indent=2)

    @classmethod
    def from_json(cls, source: str | Path) -> Recipe:
        """Read a recipe from JSON text, or from a file if `source` is a Path."""
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PhiquantError(f"the recipe is not valid JSON: {error}") from error
        if not isinstance(data, dict) or not set(data) <= {"rules", "default"}:
            raise PhiquantError('a recipe is a JSON object {"rules": {pattern: spec}, "default": spec}')
        rules = data.get("rules", {})
        if not isinstance(rules, dict):
            raise PhiquantError(f'"rules" of a recipe maps patterns to specs; it is a {type(rules).__name__}')
        return cls(rules, data.get("default", FLOAT))


def as_recipe(what: Recipe | QuantSpec | Target | str, config: Any = None) -> Recipe:
    """A recipe as it is; a spec, a target or the name of either as the default of an empty recipe.

    A mixture ("gguf:Q4_K_M") as the grid of every module by name; it needs `config`, the model's config.json as a
    mapping or a transformers config.
    """
    if isinstance(what, Recipe):
        return what
    if isinstance(what, str) and ":" in what:
        what = target(what)
    if isinstance(what, Target) and what.mixture is not None:
        if config is None:
            raise PhiquantError(f"{what.name} chooses grids by layer, so it needs a model with a config.json of phi3")
        given = config if isinstance(config, Mapping) else config.to_dict()
        phi.sizes(given)  # names what the config lacks
        return Recipe(what.mixture(given))
    return Recipe(default=what)


def _choice(value: Any) -> Choice:
    if value is None or value == FLOAT:
        return None
    if isinstance(value, str) and ":" in value:
        value = target(value)
    if isinstance(value, Target):
        if value.mixture is not None:
            raise PhiquantError(f"{value.name} is a mixture for a whole model; name the grid of one type, as gguf:Q4_K")
        return value.spec
    if isinstance(value, QuantSpec | str):
        return read_spec(value)
    raise PhiquantError(f"a recipe maps names to a spec, a target or {FLOAT!r}, not to a {type(value).__name__}")


def _text(choice: Choice) -> str:
    return FLOAT if choice is None else str(choice)


def _checked(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise PhiquantError(f"a pattern of a recipe is a non-empty string, not {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise PhiquantError(f"the recipe's pattern {pattern!r} is not a regular expression: {error}") from error
    return pattern


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
