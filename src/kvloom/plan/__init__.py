"""The planner: will it fit, for how many users, how long a context, how fast at best, and with which cache."""
