"""How far weights and base state are from a transcription of a paper."""

import math


def norm(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def distance(task, opt, theta, base):
    """How far the weights, and each kind of base state, are from the transcription: norms over all parameters."""
    parameters = dict(task.net.named_parameters())
    result = {"weights": norm([parameters[k].detach().double() - theta[k].double() for k in theta])}
    for name, p in parameters.items():
        expected, found = base.state(name), opt.base_optimizer.state[p]
        for key, value in expected.items():
            difference = norm([found[key].double() - value.double()])
            result[key] = math.hypot(result.get(key, 0.0), difference)
    return result


def assert_near(task, opt, theta, base, bound):
    for key, value in distance(task, opt, theta, base).items():
        assert value <= bound, f"{key}: off by {value:.3g}, allowed {bound:.3g}"
