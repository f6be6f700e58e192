"""Curvature of a model that `fully_shard` has cut up: every layer's belongs to one process.

    gradients, cut along their first axis   ──to_holders──>  whole gradients, each in one process
    steps, cut in the same way              <──to_shards──   whole steps

The holder of a layer keeps its factors and inverses, and no other process does. Layers are given out by how much work their
factorisations are. Both exchanges are one collective each, in which a process sends and receives no more than its own share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Size, Tensor, distributed, nn

from curvlab.errors import UnsupportedModel
from curvlab.fisher import Structure
from curvlab.fisher.power import Damps
from curvlab.rows.owners import Owner, widest
from curvlab.rows.processes import Processes, spread
from curvlab.rows.rows import Rows
from curvlab.rows.sharded import is_cut


@dataclass(frozen=True)
class Sharding:
    """Which process has the curvature of which parameters, all of them cut up.

    Attributes:
        processes: those that have a part of every parameter each.
        parameters: as they are cut.
        holders: ranks by name.
    """

    processes: Processes
    parameters: Mapping[str, Any]
    holders: Mapping[str, int]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], layers: Sequence[Owner], structure: Structure) -> Sharding | None:
        """Give out the layers of a model; None for one that is not cut up.

        Raises:
            UnsupportedModel: if parameters are cut up in another way than over all processes along their first axis.
        """
        if not any(map(is_cut, parameters.values())):
            return None
        processes = Processes.all()
        for name, parameter in parameters.items():
            _check_cut(name, parameter, processes)
        tables = [isinstance(layer.module, nn.Embedding | nn.EmbeddingBag) for layer in layers]
        work = [structure.work(layer.layout, table=table) for layer, table in zip(layers, tables, strict=True)]
        ranks = spread(work, processes.size)
        holders = {name: rank for layer, rank in zip(layers, ranks, strict=True) for name in layer.names.values()}
        return cls(processes, parameters, {name: holders[name] for name in parameters})

    def held_by(self, rank: int) -> list[str]:
        """Return the parameters whose curvature a process has."""
        return [name for name, holder in self.holders.items() if holder == rank]

    @property
    def own(self) -> list[str]:
        """The parameters whose curvature this process has."""
        return self.held_by(self.processes.rank)

    def anywhere(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return self.processes.any(flag, next(iter(self.parameters.values())).device)

    def update(self, structure: Structure, rows: Rows, decay: float, *, adds: bool) -> None:
        """Update the blocks of this process with the rows of all, and give the others those of its samples.

        Args:
            structure: holds the blocks of this process.
            rows: of all layers, and the samples of this process.
            decay: weight of the state so far.
            adds: whether moments are added up; rows of a layer are gathered otherwise, in its holder.

        Raises:
            UnsupportedModel: if blocks span several layers.
        """
        if rows.device != self._nothing.device:
            raise UnsupportedModel(
                f"Parameters wait on {self._nothing.device} and passes run on {rows.device}: leave CPUOffloadPolicy, which "
                "fully_shard was given."
            )
        if not structure.updated and structure.couples(rows):
            raise UnsupportedModel(
                f"A block of the {structure.key} structure spans several layers, which belong to different processes under "
                "fully_shard. Use one that treats every layer by itself, such as 'kfac', 'ekfac', 'block-diagonal' or 'diagonal'."
            )
        if not adds:
            structure.update(self.processes.gather_for(rows, self.holders), decay)
            return
        for rank in range(self.processes.size):
            total = self.processes.total_for(rank)
            if rank == self.processes.rank:
                structure.update(rows, decay, total=total)
            else:
                structure.lend(rows, self.held_by(rank), total)

    def direction(
        self, structure: Structure, parts: Mapping[str, Tensor], damping: float, power: float, damps: Damps
    ) -> dict[str, Tensor]:
        """Return `(F + ρI)⁻¹ grad`, or that of another power, cut up, from this process' parts of the gradient."""
        return self.to_shards(structure.direction(self.to_holders(parts), damping, power=power, damps=damps))

    def to_holders(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring parts of gradients, those of this process, to the holders; returns the whole ones of its own layers.

        Memory: that of the gradients of these layers, twice.
        """
        mine = self.own
        sent = [[parts[name] for name in self.held_by(rank)] for rank in range(self.processes.size)]
        sizes = [[self._part(name, rank).numel() for name in mine] for rank in range(self.processes.size)]
        arrived = self._exchange(sent, sizes)
        return {
            name: torch.cat(pieces).view(self.parameters[name].shape)
            for name, *pieces in zip(mine, *arrived, strict=True)
        }

    def to_shards(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut up what the holders have, in the type and the way of the parameters."""
        ranks, mine = range(self.processes.size), self.own
        cut = {name: whole[name].split([self._part(name, rank)[0] for rank in ranks]) for name in mine}
        sent = [[cut[name][rank] for name in mine] for rank in ranks]
        names = [self.held_by(rank) for rank in ranks]
        arrived = self._exchange(
            sent, [[self._part(name, self.processes.rank).numel() for name in owned] for owned in names]
        )
        found = {
            name: piece
            for owned, pieces in zip(names, arrived, strict=True)
            for name, piece in zip(owned, pieces, strict=True)
        }
        return {name: self._as_cut(name, found[name]) for name in self.parameters}

    def _part(self, name: str, rank: int) -> Size:
        """Return the shape of the part that a process has: as of `torch.chunk`, with empty ones at the end."""
        rows, *others = self.parameters[name].shape
        each = ceil(rows / self.processes.size)
        return Size((max(0, min(rows - rank * each, each)), *others))

    def _as_cut(self, name: str, part: Tensor) -> Tensor:
        like = self.parameters[name]
        shaped = part.view(self._part(name, self.processes.rank)).to(like.dtype)
        cut: Tensor = type(like).from_local(
            shaped, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return cut

    def _exchange(self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Send tensors to every process, and receive flat ones of given sizes from each."""
        outgoing = [torch.cat([self._nothing, *(tensor.reshape(-1) for tensor in to)]) for to in sent]
        totals = [sum(of_rank) for of_rank in sizes]
        incoming = self._nothing.new_empty(sum(totals))
        distributed.all_to_all_single(
            incoming, torch.cat(outgoing), totals, [len(part) for part in outgoing], group=self.processes.group
        )
        return [list(part.split(list(of_rank))) for part, of_rank in zip(incoming.split(totals), sizes, strict=True)]

    @property
    def _nothing(self) -> Tensor:
        """An empty tensor of the type in which gradients and steps travel."""
        dtype = torch.promote_types(widest(self.parameters.values()), torch.float32)
        return torch.empty(0, dtype=dtype, device=next(iter(self.parameters.values())).device)


def _check_cut(name: str, parameter: Any, processes: Processes) -> None:
    if not is_cut(parameter):
        raise UnsupportedModel(
            f"{name} is whole in every process, while other parameters are cut up. Apply fully_shard to the whole model, or leave "
            f"it to the plain gradient: plain=({name!r},)."
        )
    mesh, placements = parameter.device_mesh, parameter.placements
    along_first = len(placements) == 1 and placements[0].is_shard(0)
    if not along_first or mesh.mesh.flatten().tolist() != list(range(processes.size)):
        raise UnsupportedModel(
            f"{name} lies as {placements} on a mesh of {tuple(mesh.shape)} processes. What works are parameters cut along their "
            "first axis over all processes, as fully_shard does on a mesh of one axis: no tensor parallelism, no replicas, no "
            "shard_placement_fn."
        )
