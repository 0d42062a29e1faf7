"""Fixtures shared by the tests: a tiny random model, the embedded model, a tokenizer, short texts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

# Small tensors: more threads only wait for each other, and results do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test reaches the network

import phiquant as pq
import pytest
from phiquant import _C
from phiquant.testing import random_phi3


@pytest.fixture(params=_C.build_info()["cpu_levels"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every CPU level that this machine has, in turn."""
    before = _C.cpu_level()
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level(before)


@pytest.fixture(scope="session")
def _random_model() -> Any:
    return random_phi3()


@pytest.fixture
def tiny_model(_random_model: Any) -> Any:
    """A Phi3ForCausalLM of 2 layers with random weights; every test gets its own copy."""
    return copy.deepcopy(_random_model)


@pytest.fixture
def make_phi3() -> Callable[..., Any]:
    """random_phi3(**config), for tests that need other sizes or tied embeddings."""
    return random_phi3


@pytest.fixture(scope="session")
def _phi3_tiny() -> tuple[Any, Any]:
    return pq.load("phi3-tiny")


@pytest.fixture
def phi3_tiny(_phi3_tiny: tuple[Any, Any]) -> tuple[Any, Any]:
    """(a copy of the embedded model in float32, its tokenizer)."""
    model, tokenizer = _phi3_tiny
    return copy.deepcopy(model), tokenizer


@pytest.fixture(scope="session")
def tokenizer(_phi3_tiny: tuple[Any, Any]) -> Any:
    """The tokenizer of phi3-tiny: 4096 ids, the vocabulary of `tiny_model` as well."""
    return _phi3_tiny[1]


@pytest.fixture(scope="session")
def short_text() -> str:
    """About two thousand characters of held-out source code."""
    return pq.testing.heldout_text()[:2000]
