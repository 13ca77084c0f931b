"""A loop with what training scripts have: micro-batches, clipping, bf16 autocast, a schedule, averaged weights.

Where the script went through the micro-batches of an update once, it goes through them twice; the rest stays as it was.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lets_kernels import ASAM

EPOCHS, BATCH, MICRO_BATCHES = 10, 32, 2


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (torch.tensor(x).to(device) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = torch.randperm(len(images)).split([1437, 360])
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = ASAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=EPOCHS * 1437 // (BATCH * MICRO_BATCHES)
    )

    def backward(micro_batches: list[torch.Tensor]) -> float:
        total = 0.0
        for index in micro_batches:
            with torch.autocast(device, torch.bfloat16):
                loss = functional.cross_entropy(model(images[index]), labels[index]) / len(micro_batches)
            loss.backward()
            total += loss.item()
        return total

    loss = 0.0
    for _ in range(EPOCHS):
        for update in train[torch.randperm(1437)].split(BATCH * MICRO_BATCHES)[:-1]:
            micro_batches = list(update.split(BATCH))
            optimizer.zero_grad()
            loss = backward(micro_batches)
            with optimizer.perturbed():
                optimizer.zero_grad()
                backward(micro_batches)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # clips the gradient that the step takes
            optimizer.step()
            schedule.step()
            average.update_parameters(model)

    with torch.no_grad():
        found = [(m(images[test]).argmax(1) == labels[test]).float().mean().item() for m in (model, average)]
    print(f"loss {loss:.3f}, test accuracy {found[0]:.3f}, of the averaged weights {found[1]:.3f}")


if __name__ == "__main__":
    main()
