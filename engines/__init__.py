"""Those who use the hub: the conductor, the model, prefill and decode instances."""
