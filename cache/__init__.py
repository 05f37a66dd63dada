"""What Shoal stores: tiers of blocks and shards, and the policy that names what is to be evicted."""
