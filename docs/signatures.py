"""A griffe extension: dataclasses and named tuples of the reference show the signature that Python gives them."""

import dataclasses
import importlib
import inspect

import griffe


class Signatures(griffe.Extension):
    """Fills in `__init__`, which the source of such a class does not spell out."""

    def on_class(self, *, cls: griffe.Class, **_) -> None:
        """Called for each class before its members are read."""
        found = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if not (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
            return
        parameters = [
            griffe.Parameter(p.name, annotation=_annotation(p), kind=griffe.ParameterKind[p.kind.name.lower()], default=_default(p))
            for p in inspect.signature(found).parameters.values()
        ]
        own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(own, *parameters)))


def _default(p: inspect.Parameter) -> str | None:
    return None if p.default is p.empty else repr(p.default)


def _annotation(p: inspect.Parameter) -> str:
    return getattr(p.annotation, "__forward_arg__", str(p.annotation))
