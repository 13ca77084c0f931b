"""What surrounds the passes of a step: the module that is trained, loss scaling, random numbers, saving the model."""
