"""The upstream registries and the uplink to them."""
