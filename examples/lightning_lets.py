"""Lightning, manual optimisation: LETS learns its radius from a second closure, on batches of its own.

`self.optimizers()` does everything that the optimizer does, and its `step` counts as a step for Lightning. The closures
here are over several batches, as automatic optimisation could not do with accumulate_grad_batches.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lets_kernels import SAM, LearnedRadius


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def closure_on(self, batch):
        """Micro-batches of 32: they could also be collected from call to call of `training_step`."""

        def closure():
            self.optimizers().zero_grad()
            total = torch.zeros((), device=self.device)
            for images, labels in zip(*(x.split(32) for x in batch), strict=True):
                loss = functional.cross_entropy(self.net(images), labels, reduction="sum") / len(batch[1])
                self.manual_backward(loss)
                total += loss.detach()
            return total

        return closure

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = optimizer.step(self.closure_on(batch["train"]), val_closure=self.closure_on(batch["held_out"]))
        self.log_dict({"loss": loss, "rho": optimizer.rho})

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        radius = LearnedRadius(0.05, curvature="secant", lr=0.02)
        return SAM(self.parameters(), torch.optim.SGD, rho=radius, lr=0.1, momentum=0.9)


def main() -> None:
    pl.seed_everything(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    parts = random_split(TensorDataset(images.float() / 16, labels), [1137, 300, 360])
    train, held_out, test = (DataLoader(part, batch_size=64, shuffle=i < 2) for i, part in enumerate(parts))
    trainer = pl.Trainer(max_epochs=5, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model = Digits()
    trainer.fit(model, {"train": train, "held_out": held_out})
    metrics = dict(trainer.callback_metrics)
    [result] = trainer.validate(model, test, verbose=False)
    print(f"rho: 0.05 -> {metrics['rho']:.3f}, loss {metrics['loss']:.3f}, test accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
