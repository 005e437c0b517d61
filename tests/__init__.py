"""The tests, and what benchmarks share with them: `from tests import oracles`."""
