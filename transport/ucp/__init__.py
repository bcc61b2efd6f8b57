"""UCX through one narrow gate: `api.py` says what we ask of it, two bindings answer."""
