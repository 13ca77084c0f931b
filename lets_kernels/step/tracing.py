"""Steps under torch.compile."""

from torch._compile import _disable_dynamo  # what torch's own optimizers use; imports the compiler at the first call

#: For functions that change state which a trace does not see: torch.compile runs them as plain Python between graphs.
untraced = _disable_dynamo
