"""How much of a perturbation is left once 16-bit weights have rounded it.

A weight in bfloat16 has 8 significant bits: it moves only if its ε is at least half of the last bit. With many
parameters each element of ε is small, and most weights do not move. What remains is measured against ε in float64.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lets_kernels.ops import reference
from lets_kernels.parts.direction import Ascent
from lets_kernels.space.buckets import Bucket

NARROW = (torch.bfloat16, torch.float16)
#: Steps between two measurements; the first perturbed step is measured.
INTERVAL = 100


class PrecisionWarning(UserWarning):
    """The weights are stored in 16 bits.

    Examples:
        >>> import warnings
        >>> opt = SAM(model.bfloat16().parameters(), SGD, lr=0.1)
        >>> model(inputs.bfloat16()).sum().backward()
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", PrecisionWarning)  # stop where it is given
        ...     opt.first_step()
        Traceback (most recent call last):
            ...
        lets_kernels.step.precision.PrecisionWarning: ...
    """


def warn_of_narrow(buckets: Sequence[Bucket]) -> bool:
    """Warn if weights have 16 bits: what that means, where to look, what to do. True if some weights have 16 bits."""
    found = sorted({str(b.dtype) for b in buckets if b.dtype in NARROW})
    if found:
        warnings.warn(
            f"16-bit parameters ({', '.join(found)}): much of a small perturbation is lost when they are rounded; see "
            "metrics()['perturbation_cosine'] (1 = nothing lost). Keep float32 parameters under autocast, or under "
            "fully_shard's MixedPrecisionPolicy",
            PrecisionWarning,
            stacklevel=2,
        )
    return bool(found)


def measure(ascents: Sequence[Ascent], total: Tensor, rho: Sequence[Tensor]) -> dict[str, Tensor]:
    """What became of ε in weights of 16 bits, right after they were perturbed: 0-d float64 tensors, no wait.

    ``perturbation_cosine`` between the perturbation and ε, ``perturbation_length`` the ratio of their lengths, and
    ``perturbed_fraction`` the share of weights that moved; NaN where ε is zero. One parameter at a time is computed in
    float64. Empty if no weight has 16 bits. Measures only what this rank holds, so ranks need not agree when to
    measure.
    """
    narrow = [a for a in ascents if a.bucket.dtype in NARROW]
    if not narrow:
        return {}
    home = total.device
    sums = torch.zeros(5, dtype=torch.float64, device=home)
    for a in narrow:
        share = _sums(a, total.to(a.bucket.device), a.bucket.of_runs(rho[a.bucket.index], a.runs.indices))
        sums += share.to(home)
    dot, moved_length, length, moved, count = sums.unbind()
    return {
        "perturbation_cosine": dot / (moved_length * length).sqrt(),
        "perturbation_length": (moved_length / length).sqrt(),
        "perturbed_fraction": moved / count,
    }


def _sums(a: Ascent, total: Tensor, rho: Tensor) -> Tensor:
    """⟨δ, ε⟩, ‖δ‖², ‖ε‖², the number of moved weights and of all weights, for the perturbation δ of one bucket."""
    b, runs = a.bucket, a.runs
    out = torch.zeros(5, dtype=torch.float64, device=b.device)
    count = len(runs.indices)
    numbers = zip(a.xi if isinstance(a.xi, list) else [a.xi] * count, rho.expand(count).unbind(), strict=True)
    rows = zip(a.table.tolist(), runs.params, a.vectors, numbers, strict=True)
    for (start, numel, *scaling), weights, vector, (xi, radius) in rows:
        if not numel:
            continue
        before = b.saved[start : start + numel].double()
        exact, flag = before.clone(), torch.zeros_like(b.dirty)
        table = torch.tensor([[0, numel, *scaling]], dtype=torch.int64, device="cpu")
        flat = vector.as_strided((numel,), (1,)).double()
        scratch = torch.empty_like(exact)
        reference.perturb_([exact], [flat], scratch, flag, table, b.filter_norms, xi, a.q, total, radius)
        wanted, got = exact - before, weights.detach().as_strided((numel,), (1,)).double() - before
        out += torch.stack(
            [(got * wanted).sum(), got.square().sum(), wanted.square().sum(), (got != 0).sum(), got.new_full((), numel)]
        )
    return out
