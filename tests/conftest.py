"""Settings for all tests."""

from hypothesis import settings

# Timing never decides a test, and a failure found once is found again by everybody.
settings.register_profile("kvloom", deadline=None, derandomize=True, print_blob=True)
# `pytest --hypothesis-profile=explore` looks at other examples each time, and at more of them.
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("kvloom")
