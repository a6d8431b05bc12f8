"""Where DeepSpeed's optimizers keep this rank's part of the trained state: the one difference between ZeRO stages that
the engine has to know.

Both stages train flat fp32 tensors, one for each parameter group, of which every rank holds a part. Stage 3 gives each
rank an equal run of every parameter; stage 2 lays the parameters of a group end to end and gives each rank an equal run
of the whole. What follows are views: writing into them is training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """Where this rank's elements of one parameter lie."""

    group: int
    """Index of the flat tensor."""
    start: int
    """Index of the first element in the flat tensor."""
    offset: int
    """Index of the first element in the flattened parameter."""
    count: int
    """Number of elements."""

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's elements as a view of the flat tensor (or of another one laid out like it)."""
        return flat.narrow(0, self.start, self.count)


class Partition(Protocol):
    """This rank's part of the trained state."""

    flats: list[torch.Tensor]
    """fp32 weights that the optimizer steps on, one 1-D tensor for each parameter group."""
    gather_stream: Any
    """The device's stream that layers are gathered on; None where there is none beside the one of everything else."""

    def place(self, parameter: Any) -> Place | None:
        """Where this rank's elements of a parameter are; None when it has none."""

    def gradients(self, parameters: Iterable[Any]) -> list[torch.Tensor]:
        """This rank's fp32 gradients of those parameters that it has elements of, after the last backward of a step."""

    def publish(self) -> None:
        """Make weights that were written into `flats` the ones that forward uses. Collective."""


class Stage3Partition:
    """ZeRO-3; its optimizer's state may lie on the CPU (offload_optimizer)."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer, self._rank = optimizer, rank
        self.gather_stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        self.flats = optimizer.fp32_partitioned_groups_flat
        if optimizer.offload_optimizer:
            self._gradients = [flat.grad for flat in self.flats]
        else:
            self._gradients = list(optimizer.grad_partitions_flat_buffer.split([flat.numel() for flat in self.flats]))
        assert all(each.dtype == torch.float32 for each in self._gradients), "clipping must reach what is stepped on"
        # DeepSpeed's own norm, for every group a collective and some kernels a parameter; clipping has looked already
        optimizer._get_norm_groups = lambda: [self._gradients[0].new_zeros(())]

    def place(self, parameter: Any) -> Place | None:
        group, start, size = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        count = min(size, parameter.ds_numel - size * self._rank)  # the last parts may be padding
        return Place(group, start, size * self._rank, count) if count > 0 else None

    def gradients(self, parameters: Iterable[Any]) -> list[torch.Tensor]:
        places = [place for place in map(self.place, parameters) if place is not None]
        return [place.of(self._gradients[place.group]) for place in places]

    def publish(self) -> None:
        optimizer = self._optimizer
        for group in range(len(self.flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.invalidate_secondary_tensor()  # copies that hpZ keeps inside a node
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


class Stage2Partition:
    """ZeRO-2: parameters are whole on every rank, gradients and optimizer state are partitioned.

    Args:
        leaves: modules whose gradients are reduced together, in one order on every rank.
    """

    def __init__(self, optimizer: Any, leaves: Sequence[nn.Module]) -> None:
        self._optimizer, self.gather_stream = optimizer, None
        self.flats = optimizer.single_partition_of_fp32_groups
        optimizer.compute_grad_norm = optimizer.check_grad_overflow = False  # clipping has looked already
        self._index = {
            id(parameter): (group, index)
            for group, parameters in enumerate(optimizer.params_in_partition)
            for index, parameter in enumerate(parameters)
        }
        _reduce_leaf_by_leaf(optimizer, leaves)

    def place(self, parameter: Any) -> Place | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(mapping.param_group_index, here.start, there.start, here.numel)

    def gradients(self, parameters: Iterable[Any]) -> list[torch.Tensor]:
        places = [self._index[id(parameter)] for parameter in parameters if id(parameter) in self._index]
        return [self._optimizer.averaged_gradients[group][index] for group, index in places]

    def publish(self) -> None:
        self._optimizer.update_lp_params()


def _reduce_leaf_by_leaf(optimizer: Any, leaves: Sequence[nn.Module]) -> None:
    """Make stage 2 reduce as stage 3 does: a leaf's gradients together after its backward, zeros for what was not used.

    By itself stage 2 puts gradients into its buckets as they come. Ranks whose draws differ would then add up buckets
    of different parameters.
    """
    groups = {id(parameter): group for group, members in enumerate(optimizer.bit16_groups) for parameter in members}
    in_order = [parameter for members in optimizer.bit16_groups for parameter in members]
    own_hooks = {id(parameter): hook for parameter, hook in zip(in_order, optimizer._grad_acc_hooks, strict=True)}
    for leaf in leaves:
        members = [parameter for parameter in leaf.parameters() if parameter.requires_grad]
        for parameter in members:
            own_hooks[id(parameter)].remove()

        def reduce(module: nn.Module, grad_in: Any, grad_out: Any, members: list[nn.Parameter] = members) -> None:
            refresh = optimizer.should_refresh_expected_hook_count()
            optimizer.reenter_backward_if_needed()
            for parameter in members:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.process_gradients(parameter, groups[id(parameter)])
            expected = len(in_order) if refresh else optimizer._max_expected_hooks_seen
            optimizer.update_hook_state_and_maybe_run_epilogue(expected)

        if members:
            leaf.register_full_backward_hook(reduce)
