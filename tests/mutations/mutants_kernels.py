"""The mutations of the kernels' formulas, for mutants_table.py: file, tests, and pairs of text and replacement."""

from mutants_reference import AVERAGE, BSAM, COMBINE, EPS, FISHER, MASK, NOISE, NORM, PERTURB, RHO, STEP

MATH = "csrc/math.h"
PER_RUN = "tests/ops/test_per_run.py -k cpu"
TWO_BYTES = "tests/ops/test_perturb.py -k 'two_bytes and not emulated'"

GROUPS = [
    (
        MATH,
        NORM.format("cpu"),
        [
            ("return magnitude + xi;", "return magnitude;"),
            ("magnitude < 0x400u ? subnormal", "magnitude < 0x1u ? subnormal", TWO_BYTES),
        ],
    ),
    (
        MATH,
        PERTURB.format("cpu"),
        [
            ("return sign * power(absolute(x), q - C(1));", "return power(absolute(x), q - C(1));"),
            ("if (q == C(1)) return sign;", "if (q == C(1)) return sign * sign;"),
            ("C(q == 2 ? rho / square_root(total) : rho)", "C(q == 2 ? rho / total : rho)"),
            ("C(1 / power(total, 1 / q))", "C(1 / square_root(total))"),
            ("if (!(total > 0) || !is_finite(total))", "if (!is_finite(total))"),
            ("if (!(total > 0) || !is_finite(total))", "if (!(total > 0))"),
            ("if (!is_finite(double(length)) || !is_finite(double(shrink)))", "if (!is_finite(double(shrink)))"),
            ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16", TWO_BYTES),
            ("0xfffu + ((magnitude >> 13) & 1u)", "0x1000u", TWO_BYTES),
        ],
    ),
    (
        MATH,
        STEP.format("cpu"),
        [
            ("*m = o.momentum * *m + g;", "*m = o.momentum * (*m + g);"),
            ("g = o.nesterov ? g + o.momentum * *m : *m;", "g = *m;"),
            ("return o.lr == 0 ? theta : theta - o.lr * g;", "return theta - o.lr * g;"),
            ("return o.lr == 0 ? theta : theta - o.lr * g;", "return o.lr == 0 ? theta : theta + o.lr * g;"),
            ("theta = theta * o.shrink;", "theta = theta;"),
            ("m = m + o.one_minus_beta1 * (g - m);", "m = m + o.beta1 * (g - m);"),
            ("v = o.beta2 * v + o.one_minus_beta2 * (g * g);", "v = o.beta2 * v + o.one_minus_beta2 * g;"),
            ("(square_root(v) / o.root_bias + o.eps)", "((square_root(v) + o.eps) / o.root_bias)", EPS),
            ("return 1 - power(beta, step);", "return 1 - power(beta, step + 1);"),
            ("C(square_root(bias2)),", "C(bias2),"),
            ("C(1 - o.lr * o.weight_decay)", "C(1 - o.weight_decay)"),
            ("flags.decoupled ? C(0) : C(o.weight_decay)", "C(o.weight_decay)"),
        ],
    ),
    (
        MATH,
        RHO.format("cpu"),
        [
            ("return outer * (g_hat * g_hat) * unit;", "return outer * g_hat * unit;"),
            ("return outer * (g_hat - g);", "return outer * (g_hat + g);"),
        ],
    ),
    (
        MATH,
        FISHER.format("cpu"),
        [
            ("const C f = xi * (v * v);", "const C f = xi * v;"),
            ("near ? square_root(C(1) + f) : absolute(v)", "near ? C(1) + f : absolute(v)"),
        ],
    ),
    (
        MATH,
        "tests/ops/test_lion.py -k cpu",
        [
            ("dual(o.beta1 * m + o.one_minus_beta1 * g, C(1));", "dual(o.beta2 * m + o.one_minus_beta2 * g, C(1));"),
            ("m = o.beta2 * m + o.one_minus_beta2 * g;", "m = o.beta1 * m + o.one_minus_beta1 * g;"),
            ("theta - o.lr * (sign + o.weight_decay * theta)", "theta - o.lr * sign"),
        ],
    ),
    (
        MATH,
        BSAM.format("cpu"),
        [
            ("o.beta1 * m + o.one_minus_beta1 * (g + o.weight_decay * theta)", "o.beta1 * m + o.one_minus_beta1 * g"),
            ("return o.lr == 0 ? theta : theta - o.lr * (m / s);", "return o.lr == 0 ? theta : theta - o.lr * m;"),
            ("return o.lr == 0 ? theta : theta - o.lr * (m / s);", "return theta - o.lr * (m / s);"),
        ],
    ),
    (
        MATH,
        COMBINE.format("cpu"),
        [
            ("return a * x + b * y;", "return a * x - b * y;"),
            ("return now - before;", "return now + before;"),
            ("return now - before;", "return before - now;"),
            (
                "one_minus_beta2 * (square_root(s) * absolute(g) + damping)",
                "one_minus_beta2 * (s * absolute(g) + damping)",
                AVERAGE.format("cpu"),
            ),
            ("beta2 * s + one_minus_beta2", "s + one_minus_beta2", AVERAGE.format("cpu")),
            ("bit_cast<uint32_t>(absolute(v))", "bit_cast<uint32_t>(v)", MASK.format("cpu")),
            ("<< 32 | int64_t(word)", "<< 32", MASK.format("cpu")),
            ("return int64_t(word) << 31;", "return int64_t(word) << 30;", MASK.format("cpu")),
        ],
    ),
    (
        "csrc/cpu/draw.h",  # on the CPU Philox is computed side by side; that of random.h is the GPU's
        NOISE.format("cpu"),
        [
            ("round < 10;", "round < 9;"),
            ("(p1 >> 32) ^ c1[half] ^ all(k0)", "(p1 >> 32) ^ all(k0)"),
            ("k1 += 0xBB67AE85u;", "k1 += 0xBB67AE84u;"),
            ("c1[half] = c0[half] >> 32;", "c1[half] = all(0);", "tests/ops/test_noise.py -k 'cpu and 32_bits'"),
            ("k1 = upper(draw.seed)", "k1 = 0"),
        ],
    ),
    (
        "csrc/random.h",
        NOISE.format("cpu"),
        [
            ("float(e) * float(0.6931471805599453)", "float(e) * 0.69314f"),
            (
                "float(1. / 7)) * z",
                "float(1. / 7.01)) * z",
                "tests/ops/test_noise.py -k 'cpu and bit_for_bit and float32'",
            ),
            ("* 0x1p-32f + 0x1p-33f", "* 0x1p-32f", "tests/ops/test_noise.py -k 'cpu and bit_for_bit and float32'"),
            ("* 0x1p-30f - 0.5f", "* 0x1p-30f"),
            ("swap ? -sine : cosine", "swap ? sine : cosine"),
            ("flip = quadrant >= 2", "flip = quadrant > 2"),
            (
                "probability * 4294967296.0",
                "probability * 4290000000.0",
                "tests/ops/test_mask.py -k 'cpu and masked_bit'",
            ),
        ],
    ),
    (
        "csrc/runs.h",
        PER_RUN,
        [
            ("given_[size_t(step_ * run)]", "given_[0]"),
            ("given_[size_t(step_ * run)]", "given_[given_.size() - 1 - size_t(step_ * run)]"),
            ("step_ == 0 || int64_t(given.size()) == table.size(), what", "!given.empty(), what"),
            ("return numbers_ + step_ * run;", "return numbers_;"),
            ("(step_ == 0 || t.numel() == table.size()) && t.is_contiguous()", "t.is_contiguous()"),
            ("xi_->at(chunk.run)", "xi_->at(0)"),
        ],
    ),
    (
        "csrc/call.h",
        "tests/ops/test_refused.py -k 'cpu and momenta_go'",
        [
            ("(c.momentum.at(i) == 0)", "(c.momentum.at(0) == 0)"),
        ],
    ),
    (
        "csrc/cuda/batch.h",  # the GPU's share of it, in the emulator
        "tests/native/test_emulated.py -k numbers_of_465_runs",
        [
            ("batch.each[batch.runs] = each[next];", "batch.each[batch.runs] = each[batch.runs];"),
            ("batch.each[batch.differs ? run : 0]", "batch.each[0]"),
        ],
    ),
    (
        "csrc/cuda/ops.cpp",
        "tests/native/test_emulated.py -k numbers_of_465_runs",
        [
            ("each.push_back(c.each(i));", "each.push_back(c.each(0));"),
        ],
    ),
    (
        "lets_kernels/ops/declared.py",
        "tests/ops/test_opcheck.py -k 'restore_sgd_ and writes_what'",
        [
            ("momenta: Written[MaybeTensors],", "momenta: MaybeTensors,"),
        ],
    ),
]
