"""Tests of pages in a browser; `make test-browser` demands one, `make test` skips them without."""
