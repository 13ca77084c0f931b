"""Steps under torch.compile."""

from torch._compile import _disable_dynamo  # what torch's own optimizers use; imports the compiler at the first call

#: For what changes state that a trace does not see: under torch.compile it runs as plain Python, between two graphs.
untraced = _disable_dynamo
