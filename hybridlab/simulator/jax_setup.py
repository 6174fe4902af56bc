"""The only importer of jax: when it is first used, on the CPU, in float64, and only inside `float64_on_cpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hybridlab.errors import ConfigError


def import_jax() -> Any:
    """The module; raises `ConfigError` that says how to get it."""
    try:
        import jax
    except ImportError as error:
        raise ConfigError(
            f"step maps need jax, which cannot be imported ({error}): pip install 'hybridlab[jax]'"
        ) from None
    return jax


@contextmanager
def float64_on_cpu() -> Iterator[None]:
    """What is traced and computed inside is float64 on the CPU; outside, jax stays as the user has it."""
    jax = import_jax()
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield
