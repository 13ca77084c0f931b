"""The mutations of the foreach backend, for mutants_table.py: file, tests, and pairs of text and replacement."""

FOREACH = "lets_kernels/ops/foreach/"
OWN = "tests/ops/test_foreach.py"
NORM = "tests/ops/test_norm.py -k 'foreach and (several or all_finite or accumulate or of_zero)'"
BITS = "tests/ops/test_foreach.py -k same_bits"
PERTURB = "tests/ops/test_perturb.py -k 'foreach and (several or every_q or zero or restore or two_bytes)'"
STEP = "tests/ops/test_step.py -k 'foreach and (every_kind or gate or size_zero or starts_from or eps_is_added)'"
ZERO = "tests/ops/test_foreach.py -k keep_their_sign"
NO_RUNS = "tests/ops/test_no_runs.py -k foreach"

GROUPS = [
    (
        FOREACH + "shared.py",
        OWN,
        [
            ("x.is_cpu and type(x).__torch_dispatch__ is own", "x.is_cpu"),
            ("tensors = [x if x.is_contiguous() else line(x) for x in tensors]", "pass", BITS),
            ("_flatten_dense_tensors(tensors).double()", "_flatten_dense_tensors(tensors).float()", NORM),
            ("plan is None or plan.version != table._version", "plan is None"),
            ("return rows > 0 and all(", "return all(", NO_RUNS),
            ("if found.count(found[0]) == len(found):", "if found:"),
            ("key = (flat.data_ptr(), flat.dtype,", "key = (flat.dtype,"),
            ("flat.dtype, plan.stretches, sizes, strides)", "flat.dtype, sizes, strides)"),
            ("home, offset = flat.detach(), flat", "home, offset = flat, flat"),
            ("home.as_strided((numel,), (1,), offset + start)", "home.as_strided((numel,), (1,), start)", PERTURB),
            ("home.as_strided(size, stride, offset + start)", "home.as_strided(size, stride, start)", PERTURB),
            ("kinds.setdefault(min(row[2], FILTERS), [])", "kinds.setdefault(row[2], [])"),
            ("t = t[first : first + count].view(count, 1)", "t = t[:count].view(count, 1)", NORM),
            ("line(x).view(-1, count, length)", "line(x).view(-1, length, count).transpose(1, 2)", NORM),
            ("step = max(1, piece_size() // length)", "step = 1", "tests/ops/test_foreach.py -k whole_filters"),
            (
                "(line(x[places[0]]).split(size) for x in columns)",
                "(line(x[places[0]]).split(size)[:1] for x in columns)",
            ),
        ],
    ),
    (
        FOREACH + "norm.py",
        NORM,
        [
            ("torch._foreach_add_(scaled, xi)", "torch._foreach_add_(scaled, 2 * xi)"),
            ("scaled = torch._foreach_abs(list(map(wide, theta)))", "scaled = torch._foreach_mul(theta, 1.0)"),
            ("scale = filter_norms + xi", "scale = filter_norms * 1"),
            ("squares.add([wide(part) * t])", "squares.add([wide(part) + t])"),
            ("not _LEAST < total.item() < _MOST", "not 0 <= total.item() < _MOST", OWN),
            ("not _LEAST < total.item() < _MOST", "not _LEAST < total.item()", OWN),
            ("if x.element_size() < 4:", "if x.element_size() < 2:"),
            ("if end < x.numel():", "if end > x.numel():"),
            ("self._small.append(x[end:])", "self._small.append(x[end + 1 :])"),
            ("_ROW, _LARGE = 64, 1 << 12", "_ROW, _LARGE = 4096, 1 << 12", OWN),
            ("norms.copy_(theta.double().square()", "norms.copy_(theta.double().square_()"),
            ("norms.copy_(theta.double()", "norms.copy_(theta"),
            ("if not finite:\n        skipped", "if finite:\n        skipped"),
            ("torch.full((), float(finite)", "torch.full((), 1.0"),
        ],
    ),
    (
        FOREACH + "perturb.py",
        PERTURB,
        [
            ("olds, thetas)\n    dirty.fill_(1)", "olds, thetas)\n    dirty.fill_(0)"),
            ("(rho / total.sqrt())", "(rho / total)"),
            ("(math.isfinite(factor) and factor)", "factor"),
            ("(math.isfinite(factor) and factor)", "math.isfinite(factor)"),
            ("saved.element_size() >= 4:", "saved.element_size() >= 2:"),
            ("torch._foreach_mul_(moved, t)", "pass"),
            ("torch._foreach_add_(t, xi)", "pass"),
            ("t = torch._foreach_abs(list(map(wide, theta)))", "t = torch._foreach_mul(list(map(wide, theta)), 1.0)"),
            ("(wide(along) * norms).mul_(norms)", "(wide(along) * norms)"),
            ("scale = filter_norms + xi", "scale = filter_norms * 1"),
            ("lists(plan, params, [saved.clone()], [saved])", "lists(plan, params, [saved], [saved])", OWN),
            ("if dirty.item():\n        thetas", "if True:\n        thetas"),
            ("torch._foreach_copy_(thetas, olds)\n        dirty.fill_(0)", "torch._foreach_copy_(thetas, olds)"),
        ],
    ),
    (
        FOREACH + "step.py",
        STEP,
        [
            ("if not (lr and fits", "if not (fits", ZERO),
            ("if not (lr and len(steps)", "if not (len(steps)", ZERO),
            ("elif not gate.item():\n        restore_(params, saved, dirty, table)\n    else:\n\n", "else:\n\n"),
            (
                "elif not gate.item():\n        restore_(params, saved, dirty, table)\n    else:\n        f",
                "else:\n        f",
            ),
            ("dampening=0.0, is_first_step=False", "dampening=0.1, is_first_step=False"),
            ("dampening=0.0, is_first_step=False", "dampening=0.0, is_first_step=True"),
            ("nesterov=nesterov", "nesterov=False"),
            ("maximize=maximize, dampening", "maximize=False, dampening"),
            ("torch._fused_adamw_ if decoupled else torch._fused_adam_", "torch._fused_adamw_"),
            ("amsgrad=False, maximize=maximize", "amsgrad=False, maximize=False"),
            ("torch._foreach_add_(list(steps), 1)", "torch._foreach_add_(list(steps), 2)"),
            ("[steps[i] for i in places], lr", "[steps[0] for i in places], lr"),
            ("if dirty.item():\n        torch", "if True:\n        torch"),
            ("if theta[0].element_size() >= 4:", "if True:"),
            ("(widened[0], *widened[2:])", "(widened[0], *widened[1:-1])"),
            ("(to, found)\n    dirty.fill_(0)", "(to, found)\n    pass"),
        ],
    ),
    (
        FOREACH + "rho.py",
        "tests/ops/test_foreach.py tests/ops/test_rho.py -k 'radius_s or foreach and float64 and diagonal and several'",
        [
            ("list(plan.kinds) == [UNSCALED]", "plan.kinds"),
            ("if not (q == 2 and list", "if not (list"),
            ("outer * joined(h).square() * joined(v)", "outer * joined(h) * joined(v)"),
            ("(outer * (joined(h) - joined(g))).sum()", "(outer * (joined(h) + joined(g))).sum()"),
            (
                "outer = joined(a) - joined(b[0]) if b else joined(a)\n        found.append((outer * joined(h)",
                "outer = joined(a)\n        found.append((outer * joined(h)",
            ),
            (
                "outer = joined(a) - joined(b[0]) if b else joined(a)\n        found.append((outer * (",
                "outer = joined(a)\n        found.append((outer * (",
            ),
        ],
    ),
    (
        "lets_kernels/step/fallback.py",
        "tests/native/test_backends.py -k 'warn or without or gpu'",
        [
            ('if _said or requested != "auto"', 'if requested != "auto"'),
            ('if _said or requested != "auto" or os.environ.get(ops.ENVIRONMENT)', "if _said"),
            ("and b.device.type in _COULD", ""),
            ('b.backend == "foreach" and', ""),
        ],
    ),
]
