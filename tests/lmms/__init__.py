"""Tests that need lmms-eval; `make test-lmms` runs them in an environment of its own."""
