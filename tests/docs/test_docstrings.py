"""Every public class and function has an example in its docstring, and all of them run.

They follow on the lines in the package's docstring, as it says there.
"""

import doctest
import inspect

import pytest
import torch

import lets_kernels

NAMES = [name for name in lets_kernels.__all__ if name != "__version__"]
PARSER = doctest.DocTestParser()


def names_in_examples():
    names = {"__name__": "examples"}
    for example in PARSER.get_examples(inspect.getdoc(lets_kernels)):
        assert not example.want
        exec(compile(example.source, "<the package's docstring>", "single"), names)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name):
    torch.manual_seed(0)
    text = inspect.cleandoc(getattr(lets_kernels, name).__doc__ or "")
    test = PARSER.get_doctest(text, names_in_examples(), name, None, 0)
    assert test.examples, f"{name} has no example in its docstring"
    assert len(text[text.index(">>>") :].splitlines()) <= 12, f"the example of {name} is long"
    said = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert results.attempted and not results.failed, "".join(said)
