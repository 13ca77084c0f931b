"""Hugging Face's Trainer: override `training_step`, perturb inside, leave the final gradient; Trainer clips and steps.

The model is a small vision transformer from its configuration, without dropout. With dropout the two passes draw
different masks, unless the optimizer is made with same_rng=True.
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch.utils.data import random_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from lets_kernels import SAM


class SharpnessAwareTrainer(Trainer):
    batches: tuple = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        backward = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        loss = backward(inputs)
        self.batches = (*self.batches, inputs)
        if self.accelerator.sync_gradients:  # the last of gradient_accumulation_steps
            optimizer = self.optimizer.optimizer  # without Accelerate's wrapper
            with optimizer.perturbed():
                optimizer.zero_grad()
                for batch in self.batches:
                    backward(batch)
            self.batches = ()
        return loss


def main() -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    examples = [
        {"pixel_values": x.float().view(1, 8, 8) / 16, "labels": y} for x, y in zip(images, labels, strict=True)
    ]
    train, test = random_split(examples, [1437, 360])
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
        initializer_range=0.1,
    )
    model = ViTForImageClassification(config)
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.02, lr=3e-3)
    arguments = TrainingArguments(
        output_dir="runs/trainer",
        num_train_epochs=5,
        per_device_train_batch_size=32,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SharpnessAwareTrainer(model, arguments, train_dataset=train, optimizers=(optimizer, None))
    trainer.train()
    found = trainer.predict(test)
    accuracy = (found.predictions.argmax(1) == found.label_ids).mean()
    print(f"test loss {found.metrics['test_loss']:.3f}, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
