"""Writing an ONNX file: nodes and small constants in memory, every weight straight to the data file beside it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

PAGE = 4096
IR_VERSION = 10
OPSET = 21
MICROSOFT = "com.microsoft"


class Graph:
    """One `model.onnx` under construction in `directory`, with `model.onnx.data` open for writing.

    A weight is written when it is added and not kept, so that memory holds one parameter at a time. Tensors of a page
    or more start on a page boundary, which lets ORT map them.
    """

    def __init__(self, directory: Path, domains: Mapping[str, int]):
        self.directory = directory
        self.domains = dict(domains)
        self.inputs: list[ir.Value] = []
        self.defaults: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._once: dict[Hashable, Any] = {}
        self._data = (directory / "model.onnx.data").open("wb")

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def default(self, name: str, array: np.ndarray, shape: Sequence[int | str]) -> ir.Value:
        """An input that may be left out: also an initializer, which ONNX Runtime then does not fold into the graph."""
        value = self.input(name, ir.DataType.from_numpy(array.dtype), shape)
        self.defaults.append(self.inputs.pop())
        value.const_value = ir.tensor(array, name=name)
        self.initializers[name] = value
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        outputs: int | Sequence[bool] = 1,
        **attrs: Any,
    ) -> Any:
        """Add a node; returns its value, or a tuple of them. `outputs` may be flags: False leaves that output out."""
        name = f"{name or 'graph'}/{kind}.{len(self.nodes)}"
        flags = [True] * outputs if isinstance(outputs, int) else outputs
        values = [ir.Value(name=f"{name}:{i}" if used else "") for i, used in enumerate(flags)]
        self.nodes.append(ir.node(kind, inputs, attrs, domain=domain, outputs=values, name=name))
        kept = tuple(v for v, used in zip(values, flags, strict=True) if used)
        return kept[0] if len(kept) == 1 else kept

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()` the first time this key is asked for, the same result afterwards."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def constant(self, value: Any, dtype: type = np.int64) -> ir.Value:
        """A small tensor inside model.onnx, where shape inference sees it."""
        array = np.asarray(value, dtype)

        def make() -> ir.Value:
            return self._register(ir.tensor(array, name=f"constant.{len(self.initializers)}"))

        return self.once(("constant", array.dtype.str, array.shape, array.tobytes()), make)

    def weight(
        self, name: str, array: np.ndarray, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Write `array` to the data file. `dtype` and `shape` describe sub-byte tensors handed over packed."""
        offset = self._data.tell()
        offset += -offset % (PAGE if array.nbytes >= PAGE else 64)
        self._data.seek(offset)
        self._data.write(memoryview(np.ascontiguousarray(array)).cast("B"))
        dtype = dtype or ir.DataType.from_numpy(array.dtype)
        return self._external(name, offset, array.nbytes, dtype, array.shape if shape is None else shape)

    def view(self, value: ir.Value, name: str, shape: Sequence[int]) -> ir.Value:
        """The bytes of another weight in another shape, without a second copy."""
        of = value.const_value
        return self._external(name, of.offset, of.length, of.dtype, shape)

    def _external(self, name: str, offset: int, length: int, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        where = {"location": "model.onnx.data", "offset": offset, "length": length, "base_dir": self.directory}
        return self._register(ir.ExternalTensor(**where, dtype=dtype, shape=ir.Shape(shape), name=name))

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        if tensor.name in self.initializers:
            raise ValueError(f"two weights are called '{tensor.name}'")
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.initializers[tensor.name] = value
        return value

    def save(self) -> None:
        """Write model.onnx and close the data file."""
        self._data.close()
        graph = ir.Graph(
            [*self.inputs, *self.defaults],
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=self.domains,
            name="tpvc",
        )
        ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name="tpvc"), self.directory / "model.onnx")

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()
