"""Fixtures of all tests (see real_parts.py), and how Triton runs, before anything imports it.

A kernel decorated while TRITON_INTERPRET is unset can never be interpreted, so this comes first.
The question whether there is a GPU goes to torch, which does not import Triton.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["headrace.tests.real_parts"]
