"""3 × 3 convolutions by Winograd's minimal filtering: the same function, up to rounding, of a quarter of the products.

A tile of 4 × 4 outputs needs 6 × 6 inputs. Transformed by B, inputs and kernel are multiplied position by position,
36 products instead of 144, and A takes the sums back to outputs: F(4×4, 3×3) of Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks" (2016). For all tiles and channels at once that is 36 matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.export.counts import shapes
from dagan_rt.export.passes import (
    Constants,
    add_constant,
    constants_of,
    is_plain_convolution,
    remove_unused,
    replace_nodes,
)  # fmt: skip

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

TILE, TAPS = 4, 3
WINDOW = TILE + TAPS - 1
# One axis, at the points 0, ±1, ±2 and ∞: outputs = A ((G kernel) * (B inputs)).
A = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float64)
B = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]], np.float64
)  # fmt: skip
G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64) / 24

CHANNELS = 128  # with fewer inputs or outputs than this, moving the tiles about takes what the products save
TILES = 256  # with fewer, reading the transformed kernels does, which are four times as large
ELEMENTWISE = {"Relu", "Add", "BatchNormalization"}  # computed on tiles, so that a residual block never leaves them


def filter_minimally(model: ModelProto) -> int:
    """Rewrite wide 3 × 3 convolutions of stride 1 and padding 1 in place, and return how many; float32 graphs only.

    For maps of TILES or more tiles, whose sides are known multiples of 4, and CHANNELS or more channels in and out.
    What is elementwise between them follows; maps are taken apart into tiles before, and put together after, whole
    chains of these.
    """
    graph = model.graph
    writer = _Writer(constants_of(graph), shapes(model))
    rewritten = 0
    for node in graph.node:
        if _is_wide(node, writer):
            writer.convolve(node)
            rewritten += 1
        elif _follows(node, writer):
            writer.follow(node)
        else:
            writer.keep(node)
    if not rewritten:
        return 0
    for output in graph.output:
        writer.whole(output.name)
    replace_nodes(graph, writer.nodes)
    for name, values in writer.added.items():
        add_constant(graph, name, values)
    remove_unused(graph)
    return rewritten


def _is_wide(node: NodeProto, writer: _Writer) -> bool:
    if not is_plain_convolution(node, writer.constants):
        return False
    outputs, inputs, kernel, _ = writer.constants[node.input[1]].shape
    height, width = writer.shapes.get(node.input[0], (0, 0, 0, 0))[2:]
    whole = height % TILE == width % TILE == 0 and height * width >= TILES * TILE**2
    return kernel == TAPS and min(inputs, outputs) >= CHANNELS and whole


def _follows(node: NodeProto, writer: _Writer) -> bool:
    """Whether a node is computed on tiles: elementwise, some input in tiles already, and a sum one of equal maps."""
    if node.op_type not in ELEMENTWISE or not any(name in writer.tiled for name in node.input):
        return False
    return node.op_type != "Add" or len({writer.shapes.get(name) for name in node.input}) == 1


class _Writer:
    """The nodes of the rewritten graph, and which tensors lie there in tiles.

    In tiles a map [B, C, H, W] is [B, 16, N, C]: pixels by their place in a tile, then by tile; channels last.
    """

    def __init__(self, constants: Constants, shapes: dict[str, tuple[int, ...]]) -> None:
        self.constants, self.shapes = constants, shapes
        self.nodes: list[NodeProto] = []
        self.added: dict[str, np.ndarray] = {}
        self.tiled: dict[str, str] = {}  # a tensor -> the same in tiles
        self._absent: set[str] = set()  # tensors that are there in tiles only
        self._makers: dict[str, NodeProto] = {}  # of the others

    def keep(self, node: NodeProto) -> None:
        """A node as it is, after what puts its inputs together."""
        for name in node.input:
            self.whole(name)
        self.nodes.append(node)
        self._makers |= dict.fromkeys(node.output, node)

    def follow(self, node: NodeProto) -> None:
        """An elementwise node, on tiles."""
        if node.op_type == "BatchNormalization":
            scale, bias, mean, variance = (self.constants[name].astype(np.float64) for name in node.input[1:])
            epsilon = next((it.f for it in node.attribute if it.name == "epsilon"), 1e-5)
            slope = scale / np.sqrt(variance + epsilon)
            at = self._op("Mul", f"{node.name}/Mul", self.tiles(node.input[0]), slope)
            found = self._op("Add", node.name, at, bias - mean * slope)
        else:
            found = self._op(node.op_type, node.name, *(self.tiles(name) for name in node.input))
        self._made(node.output[0], found)

    def convolve(self, node: NodeProto) -> None:
        """A convolution, from tiles to tiles."""
        weight = self.constants[node.input[1]]
        outputs, inputs = weight.shape[:2]
        _, _, height, width = self.shapes[node.input[0]]
        tiles = height * width // TILE**2
        name = node.name
        pixels = self._reshape(f"{name}/pixels", self.tiles(node.input[0]), 0, height * width, inputs)
        zeroed = self._op("Pad", f"{name}/Pad", pixels, np.array([0, 0, 0, 0, 1, 0]))  # what windows see outside
        windows = self._op("Gather", f"{name}/Gather", zeroed, _windows(height, width), axis=1)
        windows = self._reshape(f"{name}/windows", windows, 0, WINDOW**2, tiles * inputs)
        asked = self._op("MatMul", f"{name}/inputs", np.kron(B, B), windows)
        asked = self._reshape(f"{name}/asked", asked, 0, WINDOW**2, tiles, inputs)
        # Runtimes compute this once, as they load the graph: the file keeps 9 numbers a kernel, not 36.
        taps = weight.transpose(2, 3, 1, 0).reshape(TAPS**2, -1)
        kernels = self._op("MatMul", f"{name}/kernels", np.kron(G, G), taps)
        kernels = self._reshape(f"{name}/kernels/shaped", kernels, WINDOW**2, inputs, outputs)
        products = self._op("MatMul", name, asked, kernels)
        products = self._reshape(f"{name}/products", products, 0, WINDOW**2, tiles * outputs)
        found = self._op("MatMul", f"{name}/outputs", np.kron(A, A), products)
        found = self._reshape(f"{name}/tiles", found, 0, TILE**2, tiles, outputs)
        if len(node.input) > 2:
            found = self._op("Add", f"{name}/Add", found, self.constants[node.input[2]])
        self._made(node.output[0], found)

    def tiles(self, name: str) -> str:
        """A tensor in tiles, taken apart where nothing did so before."""
        made_by = self._makers.get(name)
        if name not in self.tiled and made_by is not None and made_by.op_type in ("Relu", "BatchNormalization"):
            self.follow(made_by)  # rather its one input, which a residual block also adds
        if name not in self.tiled:
            _, channels, height, width = self.shapes[name]
            pixels = self._reshape(f"{name}/pixels", name, 0, channels, height * width)
            pixels = self._op("Transpose", f"{name}/Transpose", pixels, perm=[0, 2, 1])
            order = _numbered(height, width).argsort(axis=None)
            tiles = self._op("Gather", f"{name}/Gather", pixels, order, axis=1)
            self.tiled[name] = self._reshape(f"{name}/tiles", tiles, 0, TILE**2, -1, channels)
        return self.tiled[name]

    def whole(self, name: str) -> None:
        """Put a tensor together that is there in tiles only."""
        if name in self._absent:
            self._absent.remove(name)
            _, channels, height, width = self.shapes[name]
            pixels = self._reshape(f"{name}/together", self.tiled[name], 0, height * width, channels)
            pixels = self._op("Gather", f"{name}/Gather", pixels, _numbered(height, width).reshape(-1), axis=1)
            pixels = self._op("Transpose", f"{name}/Transpose", pixels, perm=[0, 2, 1])
            self._reshape(f"{name}/whole", pixels, 0, channels, height, width, output=name)

    def _made(self, name: str, tiled: str) -> None:
        self.tiled[name] = tiled
        if name not in self._makers:
            self._absent.add(name)

    def _reshape(self, name: str, value: str, *sizes: int, output: str = "") -> str:
        return self._op("Reshape", name, value, np.array(sizes), output=output)  # 0 copies the batch's size

    def _op(self, kind: str, name: str, *inputs: str | np.ndarray, output: str = "", **attributes: Any) -> str:
        """Write a node; arrays among its inputs become constants. Returns its output."""
        from onnx import helper

        names = []
        for at, value in enumerate(inputs):
            if isinstance(value, np.ndarray):
                names.append(f"{name}/{at}")
                self.added[names[-1]] = value
            else:
                names.append(value)
        output = output or f"{name}_in_tiles"
        self.nodes.append(helper.make_node(kind, names, [output], name, **attributes))
        return output


def _numbered(height: int, width: int) -> np.ndarray:
    """The number in tiles of every pixel: [H, W] int64."""
    rows, columns = height // TILE, width // TILE
    number = np.arange(height * width).reshape(TILE, TILE, rows, columns)
    return number.transpose(2, 0, 3, 1).reshape(height, width)


def _windows(height: int, width: int) -> np.ndarray:
    """Which pixel, by its number in tiles, each of the 36 places of each tile's window shows: [36 N] int64.

    One beyond the last pixel stands for what lies outside the map.
    """
    padded = np.pad(_numbered(height, width), 1, constant_values=height * width)
    places = np.arange(WINDOW)
    y = places[:, None, None, None] + TILE * np.arange(height // TILE)[:, None]
    x = places[:, None, None] + TILE * np.arange(width // TILE)
    return padded[y, x].reshape(-1)
