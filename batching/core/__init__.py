"""The pure heart: requests, KV blocks, scheduler, cost model. No torch, clock, chance or I/O."""
