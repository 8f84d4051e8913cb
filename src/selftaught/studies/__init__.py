"""Experiments: each a command that resumes where it was stopped."""
