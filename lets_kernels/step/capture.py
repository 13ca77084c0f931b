"""Steps that go into a CUDA graph."""

from lets_kernels.ops.memory import capturing
from lets_kernels.step.workspace import Workspace


def check_capture(w: Workspace) -> bool:
    """True if the step that begins goes into a CUDA graph. The buckets are then kept for the graph.

    Raises:
        RuntimeError: the host decides something in this step that a replay could not decide again.
    """
    if not capturing():
        return False
    setting = w.setting
    reason = setting.radius.not_capturable() or setting.direction.not_capturable()
    way_out = "capture forward and backward only, and take the step outside of the graph"
    if setting.rho_share(w.progress.step) < 1:
        reason = f"rho still rises over the first {setting.rho_warmup} steps, and a graph keeps the present one"
        way_out = f"take {setting.rho_warmup} steps before the capture (rho_warmup=), or {way_out}"
    if not setting.schedule.capturable:
        reason = f"{type(setting.schedule).__name__} decides on the host at every step whether to perturb"
        way_out = f"perturb at every step (schedule=Always()), or {way_out}"
    if reason is not None:
        raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason}. Way out: {way_out}")
    w.tables.keep_for_graphs()
    return True


def check_same_graph(captured: bool, now: str, before: str) -> None:
    """``RuntimeError`` if one part of a step is captured and another is not: a replay would repeat only one of them."""
    if captured != capturing():
        inside, outside = (before, now) if captured else (now, before)
        raise RuntimeError(f"{inside} in a CUDA graph needs {outside} in a graph too: capture both or neither")
