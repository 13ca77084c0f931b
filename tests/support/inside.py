"""What lies behind an optimizer's public face, for tests that look there; the only place that knows where."""


def work(opt):
    """What its steps work with."""
    return opt._engine.work


def now(opt):
    """What goes on."""
    return opt._engine.now


def progress(opt):
    """What is kept from step to step."""
    return opt._engine.work.progress


def held(opt):
    """What parts keep for every parameter, by parameter and name."""
    return opt._engine.work.progress.held.state


def shares(opt):
    """True if groups and state are the base optimizer's own; what parts keep is shown beside its state."""
    base = opt.base_optimizer
    if not opt._engine.work.setting.held:
        return opt.param_groups is base.param_groups and opt.state is base.state
    own = ((opt.state[p].get(k), v) for p, entry in base.state.items() for k, v in entry.items())
    return opt.param_groups is base.param_groups and opt.state.base is base and all(x is y for x, y in own)


def space(opt):
    """The tables of the parameters, built anew where they have changed."""
    return opt._engine.work.tables.current()


def waits(opt):
    """True if the radius is still to learn from the last step."""
    learning = opt._engine.work.setting.learning
    return learning is not None and learning.waits


def replace_samples(opt, samples):
    """Let it look at others; nothing but a test does so."""
    object.__setattr__(opt._engine.work.setting, "samples", samples)
