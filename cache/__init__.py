"""Stores of blocks and shards in tiers, and the policy that names the victims of eviction."""
