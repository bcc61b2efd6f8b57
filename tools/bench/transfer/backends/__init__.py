"""Who moves the bytes in the transfer benchmark: a file per contestant, all behind `api.py`."""
