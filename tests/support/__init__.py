"""Helpers of the tests: test modules import these, and never one another."""
