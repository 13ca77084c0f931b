"""What goes on: everything that a copy of the optimizer, or one that has loaded a state, begins anew."""

from dataclasses import dataclass, field

from torch import Tensor

from lets_kernels.step.convention import Convention
from lets_kernels.step.start import Start
from lets_kernels.step.step import Lesson, Step


@dataclass
class Now:
    """The only place where it is listed."""

    #: A step has been begun: its weights may be perturbed.
    step: Step | None = None
    #: The weights are moved for a first pass.
    start: Start | None = None
    #: A first pass was made at weights that had been moved for it.
    started: bool = False
    #: The radius waits for closures to learn from the last step; the lesson, if that step has one.
    radius_waits: bool = False
    lesson: Lesson | None = None
    #: Steps from which a radius could have learned and did not; None once it has.
    missed: int | None = 0
    #: What the schedule said of a step, and of which: as a rule it is asked once.
    decision: tuple[int, bool] | None = None
    #: Who makes first gradients: the closure or its caller.
    convention: Convention = field(default_factory=Convention)
    #: Calls of ``zero_grad``.
    zeroed: int = 0
    #: What the last step saw.
    seen: dict[str, Tensor] = field(default_factory=dict)
    #: Whether the last step was fused with the restore, and if not, why.
    fused: bool = False
    fused_reason: str = "no step yet"
