"""The flattened parameter space: all buckets of an optimizer's parameters."""

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lets_kernels.ops.layouts import unchanged
from lets_kernels.space.buckets import Bucket, Geometry, Member
from lets_kernels.space.memory import check_apart, check_parameter
from lets_kernels.space.shards import cuts, local, mesh_of

_requires_grad = operator.attrgetter("requires_grad")


class ParameterSpace:
    """All buckets of an optimizer's groups; rebuilt when the groups or their parameters are no longer the same."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        names: dict[int, str],
        geometry: Geometry,
        backend: str,
        flatten: bool,
        filter_dim: Callable[[Tensor], int],
    ) -> None:
        self._key = [(list(g["params"]), list(map(_requires_grad, g["params"])), g.get("adaptive")) for g in groups]
        for index, group in enumerate(groups):
            for p in group["params"]:
                check_parameter(p, f"param_groups[{index}]")
        self._check_apart(groups)
        self.buckets: list[Bucket] = []
        kinds: dict[tuple[torch.device, torch.dtype, Any, tuple[int, ...]], list[Member]] = {}
        for index, group in enumerate(groups):
            own = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
            for place, p in enumerate(group["params"]):
                if p.requires_grad:
                    member = Member(p, own.get(id(p), names.get(id(p))), index, place)
                    kinds.setdefault((p.device, p.dtype, mesh_of(p), cuts(p)), []).append(member)
        for members in kinds.values():
            bucket = Bucket(members, len(self.buckets), groups, geometry, backend, flatten)
            bucket.split_filters(filter_dim)
            self.buckets.append(bucket)
        #: The place of each bucket's first parameter among all parameters; last, their number.
        self.offsets = list(accumulate((len(b.params) for b in self.buckets), initial=0))

    def _knows(self, groups: Sequence[dict[str, Any]]) -> bool:
        """True if the groups hold the parameters of which the buckets were made, as they were."""
        if len(groups) != len(self._key):
            return False
        for group, (known, trained, adaptive) in zip(groups, self._key, strict=True):
            if not unchanged(group["params"], known, trained) or group.get("adaptive") != adaptive:
                return False
        return True

    @staticmethod
    def _check_apart(groups: Sequence[dict[str, Any]]) -> None:
        """``ValueError`` for parameters that share memory."""
        check_apart(
            (f"parameter {place} of param_groups[{index}]", local(p))
            for index, group in enumerate(groups)
            for place, p in enumerate(group["params"])
            if p.requires_grad
        )

    def look_again(self, groups: Sequence[dict[str, Any]]) -> None:
        """``ValueError`` for parameters that share memory by now; nearly free if no parameter has moved."""
        for moved in self.buckets:
            if moved.moved:
                self._check_apart(groups)
                for b in self.buckets:
                    b.moved = False
                return

    def is_current(self, groups: Sequence[dict[str, Any]]) -> bool:
        """False if the buckets must be made again.

        Raises:
            ValueError: parameters share memory by now.
        """
        if not self._knows(groups):
            return False
        for b in self.buckets:
            if not b.is_current():
                return False
        self.look_again(groups)
        return True
