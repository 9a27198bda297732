"""Hypothesis does not time what runs on a shared machine, where the first example also builds an encoding."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
