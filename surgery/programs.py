"""Programs and traces: how a model becomes one graph, and an adapted graph a program again.

An exported program keeps the inputs that it was exported with, and which of their sizes may vary.
Both go with the graph that is made of it, so that it can be exported again.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from surgery.errors import refuse
from surgery.model.holder import every_module, parameters_of, under_adapters
from surgery.state import state_of
from surgery.twin import alike, twin

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PROGRAM = "_surgery_program"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a graph needs to become a program again.

    inputs: the positional and the named ones, if the program had any. shapes: what `torch.export`
        takes as `dynamic_shapes`; None where every size is fixed.
    """

    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None
    shapes: Mapping[str, Any] | None


Form = Literal["module", "graph"]
"""Whether a model is adapted module by module, or in the one graph that it is or becomes."""


def target_of(model: nn.Module | ExportedProgram, mode: Form | None, inplace: bool) -> nn.Module:
    """The model that is adapted for one that was given, as the form asks for, or as it is.

    What is not in place is a twin; a program, and a module that is to be a graph, become graphs
    over the same data and stay as they are. Raises StateError: E414, E415, E417, E418, and E420 for
    a graph that is to be adapted module by module.
    """
    if is_program(model):
        _refuse_modules("an exported program", mode)
        return _unadapted(graph_of(model))
    module = cast(nn.Module, model)
    if isinstance(module, fx.GraphModule):
        _refuse_modules("a GraphModule", mode)
        return _unadapted(module if inplace else twin(module))
    if mode == "graph":
        return traced(module)
    return module if inplace else twin(module)


def _refuse_modules(what: str, mode: Form | None) -> None:
    if mode == "module":
        hint = "leave mode out, or compile the model that it was made of"
        refuse("E420", f"{what} is one graph, and has no modules that run by themselves", hint=hint)


def is_program(model: object) -> TypeGuard[ExportedProgram]:
    """Whether something is an exported program; torch's exporter is not imported to find out."""
    module = sys.modules.get("torch.export.exported_program")
    return module is not None and isinstance(model, module.ExportedProgram)


def graph_of(program: ExportedProgram) -> fx.GraphModule:
    """The program as a model that is one graph.

    Its parameters are other objects over the same data, so the program stays as it is. It is in
    evaluation mode, which is what adapters see; the program computes what it was exported to.
    Raises StateError (E418) for a program that has adapters in it.
    """
    model = program.module()
    for name in ("train", "eval"):  # which would only refuse
        vars(model).pop(name, None)
    _own_parameters(model)
    vars(model)[_PROGRAM] = Origin(program.example_inputs, _shapes(program, model))
    return model.eval()


def _own_parameters(model: nn.Module) -> None:
    made: dict[int, Tensor] = {}
    for module in every_module(model):
        own = cast("dict[str, Tensor | None]", parameters_of(module))
        for name, parameter in own.items():
            if parameter is not None:
                own[name] = made.setdefault(id(parameter), alike(parameter))


def _unadapted(model: nn.Module) -> nn.Module:
    """The graph; E418 if it reads adapters which no handle knows."""
    names = (name for name, _ in model.named_parameters() if under_adapters(name))
    found = next(names, None)
    if state_of(model) is None and found is not None:
        hint = "compile the program that it was made of, or merge the adapter before the export"
        refuse("E418", f"the graph has an adapter in it already: `{found}`", hint=hint)
    return model


def traced(model: nn.Module) -> fx.GraphModule:
    """The model as one graph, by `torch.fx.symbolic_trace`, over the same data.

    The model stays as it is. Raises StateError: E417 where it cannot be traced, E414 if it has
    adapters, E415 if it cannot be copied.
    """
    if state_of(model) is not None:
        refuse("E414", "the model has adapters already", hint="unload() them before it is traced")
    copied = twin(model)
    try:
        return fx.symbolic_trace(copied)
    except Exception as error:  # whatever the model's own code does with what is no tensor
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = type(model).__name__
        refuse("E417", f"torch.fx cannot trace {name}: {said}", hint=_OTHERWISE)


_OTHERWISE = 'compile what torch.export.export makes of it, or use mode="module"'


# ------------------------------------------------------------------------------------ export


def exported(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> ExportedProgram:
    """The model as a program, as it is now, with what is live in it.

    args, kwargs: example inputs; by default those of the program that it came from, whose sizes may
    vary as they might there. Raises StateError (E419) where there are none.
    """
    from torch.export import export

    origin: Origin | None = vars(model).get(_PROGRAM)
    inputs = (args or (), kwargs or {})
    if args is None and kwargs is None:
        if origin is None or origin.inputs is None:
            hint = "give them: export(args, kwargs), as the model would be called"
            refuse("E419", "there are no example inputs to export with", hint=hint)
        inputs = origin.inputs
    shapes = None if origin is None else origin.shapes
    return export(model, inputs[0], {**inputs[1]}, dynamic_shapes=cast(Any, shapes), strict=False)


def _shapes(program: ExportedProgram, model: fx.GraphModule) -> Mapping[str, Any] | None:
    """The sizes of a program's inputs that may vary, by argument."""
    from torch.utils import _pytree as pytree

    values = [*_inputs(program)]
    flat = [_Varying(program).of(value) for value in values]
    if not any(flat):
        return None
    spec = program.call_spec.in_spec
    assert spec is not None
    args, kwargs = pytree.tree_unflatten(flat, spec)
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _inputs(program: ExportedProgram) -> Iterator[object]:
    """What the graph says of each of the user's inputs, in order."""
    every = cast("Sequence[Any]", program.graph_signature.input_specs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, every, strict=True):
        if spec.kind.name == "USER_INPUT":
            yield node.meta.get("val")


class _Varying:
    """Sizes that may vary, as `torch.export` is told of them."""

    def __init__(self, program: ExportedProgram) -> None:
        ranges = cast("dict[object, Any]", cast(Any, program).range_constraints)
        self._ranges = {str(symbol): known for symbol, known in ranges.items()}

    def of(self, value: object) -> dict[int, Any] | None:
        """Which axes of an input vary; None if none does."""
        if not isinstance(value, Tensor):
            return None
        sizes = ((axis, self._size(size)) for axis, size in enumerate(value.shape))
        return {axis: size for axis, size in sizes if size is not None} or None

    def _size(self, size: object) -> Any:
        from torch.export import Dim

        if not isinstance(size, torch.SymInt):
            return None
        name = str(cast(Any, size).node.expr)
        known = self._ranges.get(name)
        if known is None:  # made of others, which will be found again
            return Dim.AUTO
        lower, upper = (_bound(end) for end in (known.lower, known.upper))
        if (lower, upper) == (2, None):  # found by the exporter, as it will be again
            return Dim.DYNAMIC
        return Dim(name, min=lower, max=upper)


def _bound(value: Any) -> int | None:
    """A bound as a number; None where there is none."""
    return None if str(value).endswith("oo") else int(value)
