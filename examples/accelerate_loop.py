"""Accelerate: `prepare` as ever, and a closure that zeroes, goes back with `accelerator.backward`, and clips.

The closure goes through all micro-batches of the step, since each pass needs every one of them. Not with
`accelerator.accumulate`: on micro-batches without a step, its optimizer would never call the closure.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lets_kernels import SAM

MICRO_BATCH = 32


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16")
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    parts = random_split(TensorDataset(images.float() / 16, labels), [1437, 360])
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    # Where there are several processes: SAM(..., process_group=torch.distributed.group.WORLD)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    model, optimizer, schedule, train, test = accelerator.prepare(
        model, optimizer, schedule, *(DataLoader(part, batch_size=64, shuffle=True) for part in parts)
    )
    for _ in range(5):
        for batch in train:
            losses = []

            def closure(batch=batch, losses=losses):
                optimizer.zero_grad()
                total = torch.zeros((), device=accelerator.device)
                for inputs, targets in zip(*(x.split(MICRO_BATCH) for x in batch), strict=True):
                    loss = functional.cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])
                    accelerator.backward(loss)
                    total += loss.detach()
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                losses.append(total)
                return total

            optimizer.step(closure)  # Accelerate's step returns nothing: losses[0] is what ours returned
            schedule.step()

    with torch.no_grad():
        right = [accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in test]
    accelerator.print(f"loss {losses[0]:.3f}, test accuracy {torch.cat(right).float().mean():.3f}")


if __name__ == "__main__":
    main()
