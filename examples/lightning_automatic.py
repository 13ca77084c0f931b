"""Lightning, automatic optimisation: return the optimizer from configure_optimizers, and that is all.

Lightning's closure is called twice a step. So `self.log` in `training_step` logs both passes (and the second loss is
the one that `on_train_batch_end` gets), and hooks that run within a pass (on_before_zero_grad, on_before_backward,
on_after_backward, on_before_optimizer_step) see perturbed weights in the second one: average weights in
on_train_batch_end, as Lightning's own callbacks do. Not with accumulate_grad_batches > 1: see lightning_lets.py.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lets_kernels import SAM


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return functional.cross_entropy(self.net(images), labels)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("loss", self.optimizers().metrics()["loss"])  # at the weights, not at the perturbed ones

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = SAM(self.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main() -> None:
    pl.seed_everything(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    train, test = random_split(TensorDataset(images.float() / 16, labels), [1437, 360])
    trainer = pl.Trainer(
        max_epochs=5,
        precision="bf16-mixed",
        gradient_clip_val=1.0,  # clips both gradients
        callbacks=[EMAWeightAveraging(decay=0.9)],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    loss = trainer.callback_metrics["loss"]
    [result] = trainer.validate(model, DataLoader(test, batch_size=360), verbose=False)
    print(f"loss {loss:.3f}, test accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
