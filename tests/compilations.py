"""How many programs JAX compiled since this module was loaded."""

import jax

COMPILED = []


def count_compilation(event: str, duration: float, **facts: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


jax.monitoring.register_event_duration_secs_listener(count_compilation)


def compilations(run):
    """How many programs one call compiles."""
    before = len(COMPILED)
    jax.block_until_ready(run())
    return len(COMPILED) - before
