"""The hub: hashing, layouts, pools, index, leases, the node and its client."""
