"""What four ranks do with methods that draw for each element; each case returns what test_mesh.py looks at."""

import torch
import torch.distributed as dist

from support.inside import space
from support.sharded_training import Net, batch, build, train, whole


def drawn(share, grouped):
    """Three steps of a method on a layout: all in one piece, on each rank. `grouped`: the ranks must be named."""

    def steps(rank, ranks, method):
        net = Net()
        model = share(net)
        opt = build(net, model, method, process_group=dist.group.WORLD if grouped else None)
        train(opt, model, lambda step: batch(ranks[rank], step), steps=3)
        return whole(opt)

    return steps


def noise(share):
    """ε of Random SAM, of all weights in one piece; and R-SAM's scales of vectors, which are one filter each."""
    net = Net()
    opt = build(net, share(net), "random-sam")
    before = whole(opt)
    with opt.perturbed():
        inside = whole(opt)
    opt.restore()
    found = torch.cat([(inside[k] - before[k]).flatten() for k in before if k.startswith("weight")])

    net = Net()
    opt, scales = build(net, share(net), "rsam"), {}
    with opt.first_pass():
        names = {id(p): name for name, p in net.named_parameters()}
        for b in space(opt).buckets:
            for i, place in b._filters_of.items():
                if b.params[i].dim() == 1:
                    scales[names[id(b.params[i])]] = b.filter_norms[place].clone()
    opt.restore()
    return found, scales
