"""The pure heart: requests, KV blocks, scheduler, cost model. No torch, clock, randomness or I/O."""
