"""Modules on the meta device to ONNX graphs whose weights lie in a file beside them."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from diagd.errors import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

Shapes = Any
"""Dynamic shapes as torch.export takes them: nested like the inputs."""

DOMAIN = "diagd"
"""Of functions."""

RMS_NORM_OPSET = 23
"""First opset with RMSNormalization."""

_SIGNATURES: Final[dict[Hashable, Any]] = {}

FOLD_LIMIT = 1024
"""Elements up to which literals are folded, and tensors in the place of weights lie in a graph."""


def trace(
    module: nn.Module,
    inputs: tuple[Any, ...],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
    dynamic_shapes: Shapes = None,
    functions: Functions | None = None,
) -> ir.Model:
    """Trace a module whose parameters may be on the meta device.

    Its operators are those that ONNX has, see ``cast`` and ``moved``, and have operands of one type: to leave
    either to PyTorch takes longer than all else.

    Args:
        module: in evaluation mode; its parameters and buffers become initializers under their own names.
        inputs: example arguments, on the device of the parameters.
        input_names: graph inputs, nested arguments flattened in order.
        output_names: graph outputs.
        opset: ONNX opset.
        dynamic_shapes: as for ``torch.export.export``, or names of axes; None fixes every size.
        functions: that the module calls.

    Returns:
        The graph, optimised, its initializers without data where the module is on the meta device.
    """
    require("onnxscript", extra="export", purpose="write ONNX graphs")
    shapes = _dimensions(dynamic_shapes)
    with _quiet(), _uncollected(), _hastened(), torch.no_grad():
        traced = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced,
            inputs,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=_TRANSLATIONS | (_OF_NORMS if opset < RMS_NORM_OPSET else {}),
        )
        assert program is not None
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta and (value := program.model.graph.initializers.get(name)):
                value.const_value = None
        model = _simplify(program.model)
    return functions.define(model, opset) if functions else model


def onnx_operator(
    name: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    **attributes: float | str | Sequence[int],
) -> Tensor:
    """One operator of ONNX, or of another domain as ``domain::name``, in a module that is traced.

    Its version is that of the graph. ``dtype`` and ``shape`` are the result's.
    """
    attrs: dict[str, Any] = dict(attributes)
    result: Tensor = torch.onnx.ops.symbolic(name, inputs, attrs=attrs, dtype=dtype, shape=shape)
    return placed(result, inputs)


def placed(result: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Placeholders are made on the CPU, see ``_hastened``; the graph has no devices."""
    device = inputs[0].device
    return result if result.device == device else torch.ops.aten._to_copy.default(result, device=device)


class Functions:
    """Parts of a module that become functions of its graph, in operators that every runtime has.

    A runtime that has a kernel of a function's name runs that; others put its operators in its place. A
    process traces each once: ``settings`` are all that bodies depend on beside inputs and attributes.
    """

    _known: Final[dict[Hashable, ir.Function]] = {}

    def __init__(self, settings: Hashable) -> None:
        self._settings, self._parts = settings, dict[str, _Part]()

    def call(
        self,
        name: str,
        body: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        outputs: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]],
        **attributes: float,
    ) -> tuple[Tensor, ...]:
        """What ``body`` gives of the inputs: tensors of these types and shapes.

        Equal names are one function. Attributes are told to kernels alone.
        """
        dtypes, shapes = zip(*outputs, strict=True)
        self._parts.setdefault(name, _Part(body, inputs, dtypes, attributes))
        results = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}", inputs, attrs={**attributes}, dtypes=dtypes, shapes=shapes, version=1
        )
        return tuple(placed(result, inputs) for result in results)

    def define(self, model: ir.Model, opset: int) -> ir.Model:
        """Give a traced graph, changed in place, the functions that it calls."""
        for name, part in self._parts.items():
            key = (self._settings, name, opset, part.interface)
            if key not in self._known:
                self._known[key] = part.function(name, opset)
            model.functions[self._known[key].identifier()] = self._known[key]
        return model


class FunctionModule(nn.Module):
    """A module that may be a function of the graph that it is traced in.

    Attributes:
        functions: of that graph; None where it has none.
    """

    functions: Functions | None = None

    def call(self, name: str, body: Callable[..., Tensor], inputs: Sequence[Tensor], outputs: int) -> Tensor:
        """``body`` of the inputs, the rows of the first with ``outputs`` columns; as a function of a name."""
        if not name or self.functions is None:
            return body(*inputs)
        shape = (*inputs[0].shape[:-1], outputs)
        (found,) = self.functions.call(name, lambda *x: (body(*x),), inputs, [(inputs[0].dtype, shape)])
        return found


class _Part(nn.Module):
    """What a function is made of; of its inputs only types and sizes are kept."""

    def __init__(
        self,
        body: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        outputs: Sequence[torch.dtype],
        attributes: Mapping[str, float],
    ) -> None:
        super().__init__()
        self._body, self._outputs, self._attributes = body, outputs, attributes
        self._types = [tensor.dtype for tensor in inputs]
        shapes: list[list[Any]] = [[*tensor.shape] for tensor in inputs]
        self._sizes = [[size if isinstance(size, int) else size.node.hint for size in s] for s in shapes]
        self._axes = tuple(
            {axis: f"axis_{axis}" for axis, size in enumerate(shape) if not isinstance(size, int)}
            for shape in shapes
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._body(*inputs)

    @property
    def interface(self) -> str:
        """All that is known of it but the body."""
        return repr((self._types, self._sizes, self._axes, self._outputs, self._attributes))

    def function(self, name: str, opset: int) -> ir.Function:
        import onnx_ir as ir

        examples = [
            torch.zeros(s, dtype=t, device="meta") for s, t in zip(self._sizes, self._types, strict=True)
        ]
        model = trace(
            self,
            tuple(examples),
            input_names=[f"input_{number}" for number in range(len(examples))],
            output_names=[f"output_{number}" for number in range(len(self._outputs))],
            opset=opset,
            dynamic_shapes=(self._axes,),
        )
        graph = model.graph
        for value in graph.initializers.values():  # a function has none
            assert value.const_value is not None
            constant = ir.AttrTensor("value", value.const_value)
            graph.insert_before(graph[0], ir.Node("", "Constant", (), [constant], outputs=[value]))
        graph.initializers.clear()
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            value.type = value.shape = None  # those of the caller
        for node in graph:  # layers of TensorRT have names of their own, and callers number alike
            node.name = f"{name}/{node.name}"
        attributes = [ir.Attr(key, ir.AttributeType.UNDEFINED, None) for key in self._attributes]
        return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` by the operator that ONNX has."""
    return x if x.dtype == dtype else torch.ops.aten._to_copy.default(x, dtype=dtype)


def moved(x: Tensor, source: int, target: int) -> Tensor:
    """``x.movedim(source, target)``, axes counted from the last, by the operator that ONNX has."""
    return x.permute(moved_axes(x.dim(), source, target))


def moved_axes(dimensions: int, source: int, target: int) -> list[int]:
    """Axes in the order that ``moved`` gives them."""
    axes = list(range(dimensions))
    axes.insert(target % dimensions, axes.pop(source % dimensions))
    return axes


def _dimensions(shapes: Shapes) -> Shapes:
    """Names of axes as ``torch.export.export`` takes them; ``torch.onnx.export`` names them again."""
    if isinstance(shapes, dict):
        return {axis: _dimensions(dimension) for axis, dimension in shapes.items()}
    if isinstance(shapes, list | tuple):
        return type(shapes)(_dimensions(shape) for shape in shapes)
    return torch.export.Dim.DYNAMIC if isinstance(shapes, str) else shapes


def _rms_norm(x: Any, shape: Sequence[int], weight: Any, epsilon: float) -> Any:
    """RMSNormalization-23 in operators of opset 18, over the last axis, in float32."""
    import onnx_ir as ir
    import onnxscript

    op: Any = onnxscript.opset18

    dtype, wide = x.dtype, ir.DataType.FLOAT
    if dtype != wide:
        x, weight = op.Cast(x, to=wide), op.Cast(weight, to=wide)
    square = op.ReduceMean(op.Pow(x, op.Constant(value_float=2.0)), op.Constant(value_ints=[-1]))
    scale = op.Reciprocal(op.Sqrt(op.Add(square, op.Constant(value_float=epsilon))))
    result = op.Mul(op.Mul(x, scale), weight)
    return result if dtype == wide else op.Cast(result, to=dtype)


_DETACH: Final = torch.ops.aten.detach_.default  # of literals of the code
_TRANSLATIONS: Final[dict[Any, Any]] = {_DETACH: lambda x: x}
_OF_NORMS: Final[dict[Any, Any]] = {torch.ops.aten.rms_norm.default: _rms_norm}


def save(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol], path: Path) -> None:
    """Write a traced graph whose initializers are referred to their data, in place; nothing is copied.

    ``tensors``: of every parameter and buffer, by name, most of them external. Their types and shapes are the
    graph's, also where PyTorch has none for them or the graph serves tables of any length.
    """
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name in tensors:  # the others are literals of the module's code and hold their data
            tensor = tensors[name]
            value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape.numpy())
    ir.save(model, path)


def _simplify(model: ir.Model) -> ir.Model:
    """Optimise a traced graph, in place, and leave out what only says how it was made.

    Nothing is made of parameters and buffers, which have no data yet.
    """
    from onnx_ir.passes.common import InlinePass
    from onnxscript import optimizer

    InlinePass(lambda function: function.domain != DOMAIN)(model)
    optimizer.optimize_ir(model, inline=False, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "diagd"
    return model


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it takes a fifth of a trace, over objects most of which stay until its end."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _hastened() -> Iterator[None]:
    """Without what the exporter does for every trace: its table of operators is made once, in half a second.

    Nor does it look for what could be decomposed, or made one type, which runs the whole program again, keep
    results of operators of equal shapes, which takes longer than to find them again where shapes are symbols,
    or note lines of code and layouts of memory, or write code of graphs that nothing runs, or prove of sizes
    what holds where an axis stays dynamic, which it looks at by itself, or work norms out for their shape, or
    have placeholders moved, or keep a record of all this, or try every rule on every node. Where another
    version of PyTorch has other names for these, a trace takes longer.
    """
    with ExitStack() as stack:
        with suppress(ImportError, AttributeError, KeyError):
            from onnx_ir.schemas import OpSignature
            from onnxscript.rewriter import RewriteRule
            from torch._decomp import decomposition_table
            from torch._dynamo import config as dynamo
            from torch.export import _trace
            from torch.fx import config as fx
            from torch.fx._lazy_graph_module import _use_lazy_graph_module
            from torch.fx.experimental import proxy_tensor
            from torch.onnx._internal.exporter import _fx_passes, _registration
            from torch.onnx.ops import _symbolic_impl

            stack.enter_context(_use_lazy_graph_module(True))
            stack.enter_context(dynamo.patch(fake_tensor_cache_enabled=False))
            stack.enter_context(_replaced(_trace, "produce_guards_and_solve_constraints", lambda **_: None))
            stack.enter_context(_replaced(fx, "do_not_emit_stack_traces", True))
            stack.enter_context(_replaced(proxy_tensor, "_extract_tensor_metadata", lambda _: None))
            where = SimpleNamespace(**vars(torch) | {"zeros": partial(torch.zeros, device="meta")})
            stack.enter_context(_replaced(_symbolic_impl, "torch", where))
            norm = torch.ops.aten._fused_rms_norm.default
            stack.callback(decomposition_table.__setitem__, norm, decomposition_table[norm])
            decomposition_table[norm] = lambda x, *_: (torch.empty_like(x), torch.empty_like(x))
            table = _registration.ONNXRegistry
            made = staticmethod(partial(_operators, table.from_torchlib))
            stack.enter_context(_replaced(table, "from_torchlib", made))
            stack.enter_context(_replaced(_fx_passes, "decompose_with_registry", lambda p, _: p))
            stack.enter_context(_replaced(_fx_passes, "insert_type_promotion_nodes", lambda _: None))
            read = staticmethod(partial(_signature, OpSignature.from_op_schema))
            stack.enter_context(_replaced(OpSignature, "from_op_schema", read))
            stack.enter_context(_replaced(logging.getLogger("torch.__trace"), "handlers", []))
            stack.enter_context(_replaced(RewriteRule, "try_rewrite", _tried(RewriteRule.try_rewrite)))
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    kept = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _tried(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """Rules are tried on nodes of their operator alone, others say no themselves, after much ado."""

    def tried(rule: Any, model: ir.Model, graph: ir.Graph, node: ir.Node, **how: Any) -> Any:
        wanted = _root(rule)
        return rewrite(rule, model, graph, node, **how) if wanted in (None, node.op_type) else None

    return tried


@cache
def _root(rule: Any) -> str | None:
    """The operator that a rule is about; None where it may be several."""
    with suppress(AttributeError):
        operator = rule._target_pattern.output_nodes[0].op_identifier()
        return operator and str(operator[1])
    return None


def _operators(make: Callable[[int], Any], opset_version: int) -> Any:
    """A copy, to which a trace may add, of the exporter's table of operators."""
    table = copy(_made_once(make, opset_version))
    table.functions = {operator: [*known] for operator, known in table.functions.items()}
    return table


@cache
def _made_once(make: Callable[[int], Any], opset: int) -> Any:
    """The exporter's table, which parses the source of five hundred functions to ask for their domain."""
    with ExitStack() as stack:
        with suppress(ImportError, AttributeError, KeyError):
            from onnxscript._internal.values import TracedOnnxFunction

            known = property(lambda function: SimpleNamespace(domain=function.opset.domain))
            stack.enter_context(_replaced(TracedOnnxFunction, "function_ir", known))
        return make(opset)


def _signature(read: Callable[[Any], Any], schema: Any) -> Any:
    """That of an operator, which the exporter reads again for every node."""
    key = (schema.domain, schema.name, schema.since_version)
    if key not in _SIGNATURES:
        _SIGNATURES[key] = read(schema)
    return _SIGNATURES[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages that diagd does not use."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
