"""For every test: no verdict depends on the speed of the machine or on the environment."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from interceptctl.private_environment import private_environment

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

for _name in os.environ.keys() - private_environment().keys():
    del os.environ[_name]
os.environ.pop("PYTHONUNBUFFERED", None)  # with it, a failed write of the output goes unnoticed
