"""Workers execute step plans: `torch_worker` on a real model, `simulated` on a cost model."""
