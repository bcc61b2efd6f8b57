"""Finds every subpackage of the four floors, so that none can be forgotten in a list."""

from setuptools import find_packages, setup

FLOORS = find_packages(include=["transport*", "kvstore*", "engines*", "tools*"])
setup(packages=["snowskin.v1", *(f"snowskin.{name}" for name in FLOORS)])
