"""What surrounds the passes of a step: the trained module, loss scaling, random numbers, saving the model."""
