"""Where the boxes of a drawn DAG go: layers from top to bottom, after Sugiyama, Tagawa and Toda (1981).

1. A node's layer is the length of the longest path to it. 2. An edge over several layers gets a bend in each of them.
3. Layers are ordered by the mean position of the neighbors, in a few sweeps down and up, and the order with the fewest
crossings is kept. 4. Each node is moved towards the mean of its neighbors as far as its layer lets it. Pure and
deterministic.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Layout", "lay_out"]

_SWEEPS = 8
_MOST_BENDS = 5_000  # beyond, edges are drawn straight: nobody can follow so many anyway


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes in pixels: the center of each node, the points that each edge goes through, and the whole picture."""

    centers: tuple[tuple[float, float], ...]
    paths: Mapping[tuple[int, int], tuple[tuple[float, float], ...]]
    width: float
    height: float


def lay_out(
    widths: Sequence[float],
    upstreams: Sequence[Sequence[int]],
    order: Sequence[int],
    height: float = 40.0,
    gap: float = 24.0,
    layer_gap: float = 44.0,
) -> Layout:
    """Places nodes of the given `widths`; `order` is topological, and names each node once.

    height: of every node. gap: between neighbors in a layer. layer_gap: between layers.
    """
    grid = _Grid(widths, upstreams, order)
    layers = _fewest_crossings(grid)
    xs = _positions(grid, layers, gap)
    ys = {node: layer * (height + layer_gap) + height / 2 for layer, nodes in enumerate(layers) for node in nodes}
    left = min((xs[node] - grid.width[node] / 2 for node in xs), default=0.0)
    right = max((xs[node] + grid.width[node] / 2 for node in xs), default=0.0)
    centers = tuple((xs[node] - left, ys[node]) for node in range(len(widths)))
    paths = {
        edge: tuple((xs[node] - left, ys[node]) for node in (edge[0], *bends, edge[1]))
        for edge, bends in grid.bends.items()
    }
    return Layout(centers, paths, right - left, max(len(layers) * (height + layer_gap) - layer_gap, 0.0))


class _Grid:
    """Nodes in layers, with the bends of long edges as further nodes, so that every edge goes to the next layer."""

    def __init__(self, widths: Sequence[float], upstreams: Sequence[Sequence[int]], order: Sequence[int]) -> None:
        layer = [0] * len(widths)
        for node in order:
            layer[node] = max((layer[above] + 1 for above in upstreams[node]), default=0)
        self.width = list(widths)
        self.layers: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
        for node in order:
            self.layers[layer[node]].append(node)
        self.above: list[list[int]] = [[] for _ in widths]
        self.below: list[list[int]] = [[] for _ in widths]
        self.bends: dict[tuple[int, int], list[int]] = {}
        many = sum(layer[n] - layer[above] - 1 for n in order for above in upstreams[n]) > _MOST_BENDS
        for node in order:
            for above in upstreams[node]:
                between = range(0) if many else range(layer[above] + 1, layer[node])
                self.bends[above, node] = self._bent(above, node, between)

    def _bent(self, above: int, node: int, between: range) -> list[int]:
        bends = []
        last = above
        for layer in between:
            bend = len(self.width)
            self.width.append(0.0)
            self.above.append([])
            self.below.append([])
            self.layers[layer].append(bend)
            self._link(last, bend)
            bends.append(bend)
            last = bend
        self._link(last, node)
        return bends

    def _link(self, above: int, below: int) -> None:
        self.below[above].append(below)
        self.above[below].append(above)


def _fewest_crossings(grid: _Grid) -> list[list[int]]:
    layers = [list(nodes) for nodes in grid.layers]
    best, fewest = [list(nodes) for nodes in layers], _crossings(layers, grid.below)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        downwards = sweep % 2 == 0
        for i in range(1, len(layers)) if downwards else range(len(layers) - 2, -1, -1):
            fixed = {node: float(at) for at, node in enumerate(layers[i - 1 if downwards else i + 1])}
            layers[i].sort(key=_mean_of(grid.above if downwards else grid.below, fixed, layers[i]))
        crossings = _crossings(layers, grid.below)
        if crossings < fewest:
            best, fewest = [list(nodes) for nodes in layers], crossings
    return best


def _mean_of(
    neighbors: Sequence[Sequence[int]], at: Mapping[int, float], nodes: Sequence[int]
) -> Callable[[int], float]:
    own = {node: float(i) for i, node in enumerate(nodes)}

    def mean(node: int) -> float:
        places = [at[near] for near in neighbors[node] if near in at]
        return sum(places) / len(places) if places else own[node]

    return mean


def _crossings(layers: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> int:
    count = 0
    for upper, lower in pairwise(layers):
        at = {node: i for i, node in enumerate(lower)}
        seen: list[int] = []
        for node in upper:
            ends = sorted(at[near] for near in below[node] if near in at)
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _positions(grid: _Grid, layers: Sequence[Sequence[int]], gap: float) -> dict[int, float]:
    xs: dict[int, float] = {}
    for nodes in layers:
        x = -sum(grid.width[node] + gap for node in nodes) / 2
        for node in nodes:
            xs[node] = x + (grid.width[node] + gap) / 2
            x += grid.width[node] + gap
    for sweep in range(2 * _SWEEPS):
        downwards = sweep % 2 == 0
        for nodes in layers if downwards else reversed(layers):
            _pull(nodes, grid.above if downwards else grid.below, grid.width, xs, gap)
    return xs


def _pull(
    nodes: Sequence[int], neighbors: Sequence[Sequence[int]], width: Sequence[float], xs: dict[int, float], gap: float
) -> None:
    """Moves `nodes`, kept in order and `gap` apart, to where they are nearest to the means of their neighbors.

    Least squares under an order: neighbors in the row that would overlap are merged into a block at their mean wish.
    """
    blocks: list[tuple[float, int, list[tuple[int, float]]]] = []  # (wished left end, members, (node, offset))
    for node in nodes:
        places = [xs[near] for near in neighbors[node]]
        wish = (sum(places) / len(places) if places else xs[node]) - width[node] / 2
        blocks.append((wish, 1, [(node, 0.0)]))
        while len(blocks) > 1 and blocks[-2][0] + _extent(blocks[-2][2], width, gap) > blocks[-1][0]:
            wish_b, count_b, members_b = blocks.pop()
            wish_a, count_a, members_a = blocks.pop()
            shift = _extent(members_a, width, gap)
            mean = (wish_a * count_a + (wish_b - shift) * count_b) / (count_a + count_b)
            members_a.extend((member, offset + shift) for member, offset in members_b)
            blocks.append((mean, count_a + count_b, members_a))
    for left, _, members in blocks:
        for node, offset in members:
            xs[node] = left + offset + width[node] / 2


def _extent(members: Sequence[tuple[int, float]], width: Sequence[float], gap: float) -> float:
    node, offset = members[-1]
    return offset + width[node] + gap
