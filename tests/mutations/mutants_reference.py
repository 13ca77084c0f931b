"""The mutations of the reference's formulas, for mutants_table.py: file, tests, and pairs of text and replacement."""

REFERENCE = "lets_kernels/ops/reference/"
FROM_SAVED = "old = torch.where(from_saved, old, theta)\n        "
SIGNED = "weights, step = wide(old), -wide(g) if maximize else wide(g)\n        if decay:"
SAVING = "old in zip(thetas, runs([saved], table), strict=True):\n        old.copy_(theta)"

# The tests of an op on one backend.
NORM = "tests/ops/test_norm.py -k '{} and several and float32'"
PERTURB = "tests/ops/test_perturb.py -k '{} and (every_q and float32 or zero or restore or powers or element-several)'"
STEP = "tests/ops/test_step.py -k '{} and (every_kind and float32 or gate or size_zero or starts_from)'"
EPS = "tests/ops/test_step.py -k 'eps_is_added and not emulated'"
ALL_FINITE = "tests/ops/test_norm.py -k 'all_finite and not emulated'"
COMBINE = "tests/ops/test_combine.py -k '{} and (layout and several or gate)'"
AVERAGE = "tests/ops/test_average.py -k '{} and (layout and several or gate or first_vector or would_stand)'"
BSAM = "tests/ops/test_bsam_step.py -k '{} and (layout and several or size_zero)'"
NOISE = "tests/ops/test_noise.py -k '{} and (layout and several or every_kind) and (float32 or bfloat16)'"
MASK = "tests/ops/test_mask.py -k '{} and (layout and several or members or not_kept or thresholds)'"
PEAKS = "tests/ops/test_peaks.py -k '{} and (layout and several or wherever or nan or same_size)'"
FISHER = "tests/ops/test_fisher.py -k '{} and layout and several'"
SWAPPED = "tests/ops/test_swapped.py -k '{} and layout and several'"
RHO = "tests/ops/test_rho.py -k '{} and (every_q or secant_of) and float64'"

GROUPS = [
    (
        REFERENCE + "shared.py",
        NORM.format("reference"),
        [
            ("return wide(theta).abs() + xi", "return wide(theta).abs()"),
            ("return wide(theta).abs() + xi", "return wide(theta) + xi"),
            (
                "return filter_norms[filter_of(row, vector.device)] + xi",
                "return filter_norms[filter_of(row, vector.device)]",
            ),
            ('.div(filter_length, rounding_mode="floor") % filter_count', " % filter_count"),
            ("f = xi * (v * v)", "f = xi * v", FISHER.format("reference")),
            ("root(1 + f).reciprocal()", "(1 + f).reciprocal()", FISHER.format("reference")),
            ("x.sign() * x.abs().pow(q - 1)", "x.abs().pow(q - 1)", PERTURB.format("reference")),
            ("x.sign() * x.abs().pow(q - 1)", "x.sign() * x.abs().pow(q)", PERTURB.format("reference")),
            ("r = x.double().sqrt()", "r = x.double().abs()", FISHER.format("reference")),
        ],
    ),
    (
        REFERENCE + "norm.py",
        NORM.format("reference"),
        [
            (
                "scaled.double().abs().pow(q).sum()",
                "scaled.double().abs().pow(2).sum()",
                "tests/ops/test_norm.py -k 'reference and every_q'",
            ),
            ("total += scaled.double()", "total += scaled.half().double()"),
            ("filters.square().sum(dim=(0, 2)).sqrt()", "filters.square().sum(dim=(0, 2))"),
            ("filters.square().sum(dim=(0, 2)).sqrt()", "filters.square().mean(dim=(0, 2)).sqrt()"),
            ("return finite.double()", "return torch.ones_like(finite).double()", ALL_FINITE),
            ("(~finite).to(skipped.dtype)", "finite.to(skipped.dtype)", ALL_FINITE),
            ("for v in values]).all()", "for v in values]).any()", ALL_FINITE),
            ("v.double().abs().max()", "v.double().max()", PEAKS.format("reference")),
            ("torch.maximum(highest, v", "torch.fmax(highest, v", PEAKS.format("reference")),
            ("torch.where(peak, v.sign(), torch.zeros_like(v))", "peak.to(v.dtype)", PEAKS.format("reference")),
            ("count += peak.sum()", "count += peak.any()", PEAKS.format("reference")),
        ],
    ),
    (
        REFERENCE + "perturb.py",
        PERTURB.format("reference"),
        [
            ("each_radius(rho / total.sqrt() if q == 2", "each_radius(rho / total if q == 2"),
            ("shrink = total.pow(-1 / q) if", "shrink = total.pow(-1 / 2) if"),
            ("wide(theta) + factor * (t * dual(scaled, q))", "wide(theta) - factor * (t * dual(scaled, q))"),
            ("wide(theta) + factor * (t * dual(scaled, q))", "wide(theta) + factor * dual(scaled, q)"),
            ("usable = torch.isfinite(total) & (total > 0)", "usable = torch.isfinite(total)"),
            ("usable = torch.isfinite(total) & (total > 0)", "usable = total > 0"),
            ("& factor.isfinite() & inner.isfinite()", ""),
            (SAVING + "\n    dirty.fill_(1)", SAVING),
            ("theta.copy_(torch.where(dirty != 0, old, theta))", "theta.copy_(old)"),
            ("v.clone() for v in runs([saved], table)", "v for v in runs([saved], table)", SWAPPED.format("reference")),
        ],
    ),
    (
        REFERENCE + "step.py",
        "tests/ops/test_lion.py -k reference",
        [
            ("(keep1 * average + (1 - keep1) * gradient).sign()", "(keep2 * average + (1 - keep2) * gradient).sign()"),
            ("new = weights - rate * (sign + decay * weights)", "new = weights - rate * sign"),
            ("(keep2 * average + (1 - keep2) * gradient).to(m.dtype), m)", "average, m)"),
        ],
    ),
    (
        REFERENCE + "step.py",
        STEP.format("reference"),
        [
            (SIGNED, SIGNED.replace("-wide(g) if maximize else ", "")),
            (FROM_SAVED + SIGNED, SIGNED),
            ("average = inertia * wide(m) + step", "average = inertia * (wide(m) + step)"),
            ("step + inertia * average if nesterov else average", "average"),
            ("new = weights - rate * step if rate else weights", "new = weights + rate * step if rate else weights"),
            ("new = weights - rate * step if rate else weights", "new = weights - rate * step"),
            (
                "m.copy_(torch.where(go, average.to(m.dtype), m))\n        new",
                "m.copy_(average.to(m.dtype))\n        new",
            ),
            ("weights * (1 - rate * decay)", "weights * (1 - decay)"),
            ("wide(m) + (1 - keep1) * (step - wide(m))", "wide(m) + keep1 * (step - wide(m))"),
            ("keep2 * wide(v) + (1 - keep2) * (step * step)", "keep2 * wide(v) + step * step"),
            ("(rate / (1 - keep1**count)).to", "(rate * count**0).to"),
            ("(1 - keep2**count).sqrt().to", "(1 - keep2**count).to"),
            ("square.sqrt() / root_bias + small", "(square.sqrt() + small) / root_bias", EPS),
            ("t.add_(go.to(t.dtype))", "t.add_(1)"),
            ("v.copy_(torch.where(go, square.to(v.dtype), v))", "v.copy_(square.to(v.dtype))"),
            ("(wide(g) + decay * weights)", "wide(g)", BSAM.format("reference")),
            ("new = weights - rate * (average / wide(s))", "new = weights - rate * average", BSAM.format("reference")),
            ("(average / wide(s)) if rate else weights", "(average / wide(s))", BSAM.format("reference")),
            ("keep1 * wide(m) + (1 - keep1) * (wide(g)", "wide(m) + (1 - keep1) * (wide(g)", BSAM.format("reference")),
        ],
    ),
    (
        REFERENCE + "combine.py",
        COMBINE.format("reference"),
        [
            ("(a * wide(u) + b * wide(v)).to", "(a * wide(u) - b * wide(v)).to"),
            ("(a * wide(u) + b * wide(v)).to", "(b * wide(u) + a * wide(v)).to"),
            ("torch.where(gate != 0, (a", "torch.where(gate == gate, (a"),
            ("(a * b).sum(), (b * b).sum()", "(a * b).abs().sum(), (b * b).sum()"),
            ("(a * b).sum(), (b * b).sum()", "(a * b).sum(), (a * a).sum()"),
            ("_products(runs(x, table), runs(y, table), x", "_products(runs(y, table), runs(x, table), x"),
            ("wide(theta) - wide(old)", "wide(theta) + wide(old)"),
            ("wide(theta) - wide(old)", "wide(old) - wide(theta)"),
            ("wide(theta) - wide(old)", "theta - old", "tests/ops/test_combine.py -k 'reference and arithmetic_type'"),
        ],
    ),
    (
        REFERENCE + "average.py",
        AVERAGE.format("reference"),
        [
            ("decay * wide(m) + (1 - decay) * wide(x)", "decay * wide(m) + wide(x)"),
            ("begins, go = updates == 0, gate != 0", "begins, go = updates < 0, gate != 0"),
            ("m.copy_(torch.where(go, moved, m))", "m.copy_(moved)"),
            ("torch.where(begins, wide(x), a * wide(x)", "torch.where(begins, b * wide(x), a * wide(x)"),
            ("a * wide(x) + b * wide(m)).to(m.dtype)", "a * wide(x) + b * wide(m))"),
            ("a * wide(x) + b * wide(m)).to(m.dtype)", "b * wide(x) + a * wide(m)).to(m.dtype)"),
            ("updates.add_(go.to(updates.dtype))", "updates.add_(1)"),
            ("(wide(g) / before)", "(wide(g) / root(before))"),
            ("root(before) * wide(g).abs() + added", "before * wide(g).abs() + added"),
            ("root(before) * wide(g).abs() + added", "root(before) * wide(g) + added"),
            ("* wide(g).abs() + added)", "* wide(g).abs()) + added"),
            ("s.copy_(torch.where(go, after.to(s.dtype), s))", "s.copy_(after.to(s.dtype))"),
        ],
    ),
    (
        REFERENCE + "noise.py",
        NOISE.format("reference"),
        [
            ("high + (low >> 16)", "high"),
            ("for _ in range(10)", "for _ in range(9)"),
            ("high1 ^ c[1] ^ k0, low1", "high1 ^ k0, low1"),
            ("(k1 + 0xBB67AE85)", "(k1 + 0xBB67AE84)"),
            ("c = [k & _LOW, k >> 32,", "c = [k & _LOW, 0 * k,", "tests/ops/test_random.py -k 'words_are_those'"),
            ("e.float() * 0.6931471805599453", "e.float() * 0.69314"),
            ("1 / 3) * z + 1\n    return", "1 / 3) * z + 2\n    return"),
            ("torch.where(swap, -sine, cosine)", "torch.where(swap, sine, cosine)"),
            ("quadrant % 2 == 1, quadrant >= 2", "quadrant % 2 == 1, quadrant > 2"),
            ("* 2.0**-30 - 0.5)", "* 2.0**-30)"),
            ("std * root(wide(s)).reciprocal()", "std * wide(s).reciprocal()"),
            ("std * filter_norms[filter_of(row, random.device)]", "std * filter_norms[0]"),
            ("else a * wide(v) + moved", "else wide(v) + moved"),
            ("total += to.double().square().sum()", "total += moved.double().square().sum()"),
        ],
    ),
    (
        REFERENCE + "mask.py",
        MASK.format("reference"),
        [
            ("torch.where(keep != 0, v, torch.zeros_like(v))", "v * (keep != 0)"),
            ("torch.where(keep != 0, v", "torch.where(keep == 1, v"),
            ("(wide(v) * (1 / share)).to", "wide(v).to"),
            ("< int(share * 2**32)", "> int(share * 2**32)"),
            ("total += v.double().square().sum()", "total += to.double().square().sum()"),
            ("key << 31 if v is None", "key << 30 if v is None"),
            (".long() << 32) | key", ".long() << 32)"),
            ("v.float().abs().view", "v.float().view"),
            ("above = key > threshold", "above = key >= threshold"),
            ("above if member < 0 else above & (own == member)", "above"),
            ("total += above.sum()", "total += above.any()"),
            ("own.masked_fill_(above, value)", "own.masked_fill_(above, 1)"),
        ],
    ),
    (
        REFERENCE + "rho.py",
        RHO.format("reference"),
        [
            ("h.double().square() * unit", "h.double() * unit"),
            ("t * dual(scaled.double(), q))", "dual(scaled.double(), q))"),
            ("(t * dual(scaled, q)).double()", "dual(scaled, q).double()"),
            ("h.double() - g.double()", "h.double() + g.double()"),
            ("a.double() - b.double()", "b.double() - a.double()"),
        ],
    ),
]
