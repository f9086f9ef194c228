"""The gates of one steered model in one optimizer step: the term before it, and the target after it."""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.ops import algebra
from timm_dgconv.optim.cost import Table, slopes

if TYPE_CHECKING:
    from timm_dgconv.optim.steering import Steering

REACHED = 0.97
"""Share of a target from which on it is reached. A target in connections is an upper limit only."""


class SteeredModel:
    """The layers of one steered model, seen from one optimizer. All gates have one order, that of `flat`.

    Args:
        steering: What steers the model.
        layers: The layers, by their position in the model.
        trained: The gate parameters that may change, among other tensors.

    Attributes:
        steering: What steers the model.
        steerings: `steering`, and that of each layer that is a copy. All of them count the steps of the model.
        gates: The gate parameters of all layers. Layers can share them.
        trained: The gate parameters that may change.
        places: Per layer the places of its gates.
        tables: Per layer its costs.
        rest: The cost of the rest of the network.
        is_limit: Whether a target is an upper limit only.
        nested: Per layer whether only the gates that can flip next learn.

    Raises:
        RuntimeError: If the steering waits for a cost.
    """

    def __init__(self, steering: "Steering", layers: dict[int, DGConv2d], trained: Collection[Any]) -> None:
        if steering.cost is None:
            raise RuntimeError(
                "complexity_unit='macs' needs the size of the images, and the model has no pretrained_cfg with one; "
                "build the model with img_size=N"
            )
        self.steering = steering
        self.steerings = {steering, *(layer.steered.steering for layer in layers.values())}
        self.gates = list(dict.fromkeys(layer.gate for layer in layers.values()))
        self.trained = [gate for gate in self.gates if gate in trained]
        ends = itertools.accumulate(gate.numel() for gate in self.gates)
        places = {gate: range(end - gate.numel(), end) for gate, end in zip(self.gates, ends, strict=True)}
        self.places = tuple(places[layer.gate] for layer in layers.values())
        self.tables = tuple(steering.cost.tables[index] for index in layers)
        self.rest, self.is_limit = steering.cost.rest, steering.cost.is_limit
        self.nested = tuple(layer.sort and layer.nested for layer in layers.values())

    @property
    def target(self) -> float:
        """The largest cost at the target."""
        assert self.steering.target is not None
        return self.steering.target * (self.rest + sum(table[0] for table in self.tables))

    @property
    def budget(self) -> float:
        """The largest cost after the steps so far, on the cubic schedule of Zhu and Gupta if `gate_steps` is given."""
        steering = self.steering
        if steering.start is None or not steering.steps:
            return self.target
        left = max(0.0, 1 - 2 * steering.taken / steering.steps)
        return self.target + max(0.0, steering.start - self.target) * left**3

    def flat(self) -> Tensor:
        """Return a copy of all gates as one tensor, in single precision at least."""
        gates: list[Any] = [gate.detach() for gate in self.gates]
        wholes = [gate.full_tensor() if hasattr(gate, "full_tensor") else gate for gate in gates]  # of a DTensor
        like = wholes[0].new_empty(0, dtype=torch.promote_types(wholes[0].dtype, torch.float32))
        return torch.cat([whole.to(like) for whole in wholes])

    def split(self, flat: Tensor) -> dict[Tensor, Tensor]:
        """Return the part of each gate parameter."""
        return dict(zip(self.gates, flat.split([gate.numel() for gate in self.gates]), strict=True))


@torch.no_grad()
def add_term(model: SteeredModel, signs: Mapping[Any, int], grad_scale: Tensor | None) -> None:
    """Add the term to the gradients of some gate parameters, in few operations for all layers.

    The derivative of a layer's cost is that of `timm_dgconv.optim.cost.slopes`, for each of its gates that learns.

    Args:
        model: The gates of a model.
        signs: Gate parameter -> 1, or -1 if the optimizer maximizes, which negates the gradient.
        grad_scale: By how much a fused optimizer divides the gradients itself, or None.
    """
    flat = model.flat()
    index, tables, nested = _layout(model.places, model.tables, model.nested, flat.dtype, flat.device)
    rows = nn.functional.pad(flat, (0, 1), value=math.inf)[index]  # (layers, largest number of gates)
    closed = algebra.closed_gates(rows)
    costs, of_closed, of_open = tables.gather(2, closed.sum(1).view(1, -1, 1).expand(3, -1, 1))
    total = (costs.sum() + model.rest).clamp_min(1e-30)  # a measured cost can be 0
    derivative = torch.where(closed, of_closed, of_open) * (model.steering.weight * math.log(2) / total)
    if model.steering.target is not None:
        derivative *= total > model.budget
    if grad_scale is not None:
        derivative *= grad_scale.to(flat.device)
    learns = torch.zeros_like(rows)  # with nested gates, the closed and the open gate nearest to zero
    for side in (closed, ~closed):
        distance = torch.where(side, rows.abs(), math.inf)
        learns.scatter_add_(1, distance.argmin(1, keepdim=True), distance.amin(1, keepdim=True).isfinite().to(flat))
    learns = torch.where(nested.unsqueeze(1), learns, 1)
    terms = flat.new_zeros(len(flat) + 1).index_add_(0, index.flatten(), (learns * derivative).flatten())
    parts = model.split(terms[:-1])
    grads, pieces = [], []
    for gate, sign in signs.items():
        grad: Any = torch.zeros_like(gate) if gate.grad is None else gate.grad
        part: Any = (sign * parts[gate]).to(grad.dtype)
        gate.grad = grad
        if hasattr(grad, "to_local"):  # a DTensor, of which this process has a part
            part = type(grad).from_local(part, grad.device_mesh).redistribute(placements=grad.placements).to_local()
            grad = grad.to_local()
        grads.append(grad)
        pieces.append(part.to(grad.device))
    _compat.foreach_add_(grads, pieces)


@functools.lru_cache(maxsize=64)
def _layout(
    places: tuple[range, ...],
    tables: tuple[Table, ...],
    nested: tuple[bool, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of the gates in rows of one length, one row per layer, and per layer its costs and `nested`.

    The place after the last gate fills the rows. The costs are of shape (3, layers, largest number of gates + 1): the
    costs and the slopes of closed and of open gates at each number of closed gates.
    """
    rows = [torch.tensor(place, device="cpu") for place in places]
    end = max(place.stop for place in places)
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
    kinds = zip(*((table, *slopes(table)) for table in tables), strict=True)
    columns = [[torch.tensor(values, dtype=dtype, device="cpu") for values in kind] for kind in kinds]
    costs = torch.stack([nn.utils.rnn.pad_sequence(kind, batch_first=True) for kind in columns])
    return index.to(device), costs.to(device), torch.tensor(nested, device=device)


@torch.no_grad()
def hold_gates(model: SteeredModel, before: Tensor | None = None) -> None:
    """Close gates until the network is within its target, and open gates that need not have closed.

    Args:
        model: The model, after a step of the optimizer if `before` is given.
        before: All gates before the step.
    """
    flat = model.flat()
    old, stepped = torch.stack([flat if before is None else before, flat]).tolist()  # one transfer
    tables: dict[range, Table] = {}  # layers that share their gates are one row
    for place, table in zip(model.places, model.tables, strict=True):
        tables[place] = tuple(map(sum, zip(tables[place], table, strict=True))) if place in tables else table

    def cost(values: list[float], places: Iterable[range]) -> float:
        return sum(tables[p][sum(map(algebra.is_closed, values[p.start : p.stop]))] for p in places)

    steering = model.steering
    previous = model.rest + cost(old, tables)
    if before is None:
        budget = allowed = model.target
    else:
        steering.start = previous if steering.start is None else steering.start
        budget = model.budget
        allowed = budget if steering.steps else max(budget, previous)  # without a schedule, the term closes gates
    floor = 0.0 if model.is_limit else REACHED * model.target
    gates = {place: gate for place, gate in zip(tables, model.gates, strict=True) if gate in set(model.trained)}
    rest = model.rest + cost(stepped, tables.keys() - gates)
    olds, news = ([values[place.start : place.stop] for place in gates] for values in (old, stepped))
    held = hold(olds, news, [tables[place] for place in gates], rest, budget, allowed, floor)
    for gate, row, values in zip(gates.values(), held, news, strict=True):
        for n, (value, without) in enumerate(zip(row, values, strict=True)):
            if algebra.is_closed(value) != algebra.is_closed(without):
                gate[n] = value


def hold(
    before: Sequence[Sequence[float]],
    stepped: Sequence[Sequence[float]],
    tables: Sequence[Table],
    rest: float,
    budget: float,
    allowed: float,
    floor: float,
) -> list[list[float]]:
    """Return the gates after a step, closed or opened until their cost is allowed and, if possible, at least `floor`.

    Open gates compete for the budget by their distance from zero, as the scores of movement pruning do
    (https://arxiv.org/abs/2005.07683). A gate that is turned keeps its distance from zero.

    Args:
        before: The gates before the step, one row per gate parameter that learns.
        stepped: The gates after it.
        tables: The costs of each row with 0, 1, ..., K closed gates.
        rest: Cost of everything else.
        budget: The largest cost up to which gates open.
        allowed: The largest cost that the step may leave, at least `budget`.
        floor: The smallest cost from which on no further gates open.
    """
    rows = [list(row) for row in stepped]
    counts = [sum(map(algebra.is_closed, row)) for row in rows]
    cheapest = [table.index(min(table)) for table in tables]
    places = [(r, k) for r, row in enumerate(rows) for k in range(len(row))]
    nearest = sorted(places, key=lambda place: abs(rows[place[0]][place[1]]))

    def is_closed(r: int, k: int) -> bool:
        return algebra.is_closed(rows[r][k])

    def total() -> float:
        return rest + sum(table[m] for table, m in zip(tables, counts, strict=True))

    def turn(r: int, k: int) -> None:
        rows[r][k] = -rows[r][k]
        counts[r] += 1 if is_closed(r, k) else -1

    for r, k in nearest:  # measured costs may rise again: a layer with too many groups opens gates
        if total() <= allowed:
            break
        if tables[r][counts[r]] > tables[r][cheapest[r]] and is_closed(r, k) == (counts[r] > cheapest[r]):
            turn(r, k)

    def open_again(places: Sequence[tuple[int, int]], enough: float) -> None:
        for r, k in places:
            if total() >= enough:
                break
            if is_closed(r, k):
                turn(r, k)
                if total() > budget:
                    turn(r, k)

    has_closed = [(r, k) for r, k in nearest if is_closed(r, k) and not algebra.is_closed(before[r][k])]
    open_again(has_closed, math.inf)
    open_again(nearest, floor)
    if total() < floor:  # nothing fits: one gate opens, and a gate of another row closes
        first = {(r, is_closed(r, k)): k for r, k in reversed(nearest)}  # the nearest gate of each row and side
        exchanges, now = [], total()
        for opens, closes in itertools.product(first.items(), repeat=2):
            (r, r_is_closed), k = opens
            (s, s_is_closed), n = closes
            if r != s and r_is_closed and not s_is_closed:
                opened, closed = tables[r][counts[r] - 1 : counts[r] + 1], tables[s][counts[s] : counts[s] + 2]
                if floor <= now + opened[0] - opened[1] - closed[0] + closed[1] <= budget:
                    exchanges.append((abs(rows[r][k]) + abs(rows[s][n]), (r, k), (s, n)))
        if exchanges:
            _, opening, closing = min(exchanges)
            turn(*opening)
            turn(*closing)
            open_again(has_closed, math.inf)
    return rows
